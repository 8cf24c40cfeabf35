"""Class weights and their loss: by hand, as scikit-learn and torch have them, and in a Trainer's steps."""

import copy

import numpy as np
import pytest
import torch
from tiny import pixels, tiny
from torch.nn import functional as F
from torch.utils.data import StackDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from tunings import parts_of

from hf_mae import MAEForImageClassification
from hf_mae.training.class_weights import WeightedLoss, balanced_weights

WEIGHTS = torch.tensor([0.2, 5.0, 1.5])
LABELS = {
    "hard": torch.tensor([0, 0, 0, 1, 0, 2, 0, 0]),
    "soft": torch.tensor([[0.9, 0.1, 0], [0.3, 0, 0.7], [0, 1, 0], [0.5, 0.2, 0.3]] * 2),
    "several": torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]] * 2),
}


def loss_by_hand(logits: torch.Tensor, kind: str, weights=(1.0, 1.0, 1.0)) -> torch.Tensor:
    """The mean over images, class by class."""
    total, labels = torch.zeros(()), LABELS[kind]
    for image, of_image in enumerate(logits):
        for number, weight in enumerate(weights):
            if kind == "several":
                target, chance = labels[image, number], of_image[number].sigmoid()
                total = total - (weight * target * chance.log() + (1 - target) * (1 - chance).log()) / 3
            else:
                share = labels[image, number] if kind == "soft" else labels[image] == number
                total = total - weight * share * of_image.log_softmax(0)[number]
    return total / len(logits)


def test_one_class_an_image_is_weighted_as_scikit_learn_does():
    utils = pytest.importorskip("sklearn.utils")
    targets = torch.tensor([0] * 1000 + [1] * 20)
    assert balanced_weights(targets, 2).tolist() == pytest.approx([1020 / 2000, 1020 / 40])
    targets = torch.multinomial(torch.tensor([0.7, 0.2, 0, 0.09, 0.01]), 500, replacement=True)
    present = [0, 1, 3, 4]
    expected = utils.compute_class_weight("balanced", classes=np.array(present), y=targets.numpy())
    weights = balanced_weights(targets, 5)
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights[present], expected, rtol=1e-6)
    assert weights[2] == 1  # no image has it
    assert float(weights[targets].mean()) == pytest.approx(1, rel=1e-5)
    assert balanced_weights(torch.tensor([1, 1]), 2).tolist() == [1, 1]


def test_several_classes_an_image_are_weighted_by_negatives_to_positives():
    targets = torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    assert balanced_weights(targets, 4).tolist() == pytest.approx([4, 1, 2 / 3, 1])


@pytest.mark.parametrize("kind", LABELS)
def test_the_loss_is_the_mean_over_images_of_weighted_terms(kind):
    logits, labels = torch.randn(8, 3, requires_grad=True), LABELS[kind]
    loss = WeightedLoss(WEIGHTS, several=kind == "several")
    found = loss({"logits": logits}, labels, torch.tensor(labels.numel()))
    torch.testing.assert_close(found, loss_by_hand(logits, kind, WEIGHTS.tolist()))
    if kind == "several":
        expected = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=WEIGHTS)
    else:
        # torch divides class indices by the sum of weights, and soft labels by the number of images.
        expected = F.cross_entropy(logits, labels, WEIGHTS) * (WEIGHTS[labels].sum() / 8 if kind == "hard" else 1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", LABELS)
def test_an_evaluation_has_the_loss_of_the_model(kind):
    problem = "multi_label_classification" if kind == "several" else "single_label_classification"
    model = tiny(MAEForImageClassification, num_labels=3, problem_type=problem)
    labels = LABELS[kind]
    with torch.no_grad():
        outputs = model(pixels(8), labels=labels)
        found = WeightedLoss(WEIGHTS, kind == "several")(outputs, labels, torch.tensor(labels.numel()))
    torch.testing.assert_close(found, outputs.loss)
    torch.testing.assert_close(found, loss_by_hand(outputs.logits, kind))


class Gradients(TrainerCallback):
    """The gradients of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", LABELS)
def test_gradients_of_a_step_are_the_same_in_micro_batches_of_eight_and_of_two(kind, tmp_path):
    problem = "multi_label_classification" if kind == "several" else "single_label_classification"
    model = tiny(MAEForImageClassification, num_labels=3, problem_type=problem)
    data = StackDataset(pixel_values=pixels(8), labels=LABELS[kind])
    found = []
    for size in (8, 2):
        seen = Gradients()
        args = TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1,
            max_grad_norm=0, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        loss = WeightedLoss(WEIGHTS, several=kind == "several")
        trainer = Trainer(copy.deepcopy(model), args, train_dataset=data, compute_loss_func=loss, callbacks=[seen])
        trainer.train()
        found.append((trainer.state.log_history[0]["loss"], seen.gradients))
    expected = loss_by_hand(model(pixels(8)).logits, kind, WEIGHTS.tolist())
    expected.backward()
    for loss, gradients in found:
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_a_run_weighs_the_classes_of_its_training_rows(pretrained, tmp_path):
    parts = parts_of(tmp_path / "out", model=pretrained, class_weights="balanced", max_samples=100)
    counts = torch.bincount(parts["train_dataset"].targets, minlength=10)
    assert counts.sum() == 100
    assert counts.min() < counts.max()
    torch.testing.assert_close(parts["compute_loss_func"].weights, 10 / counts)
    assert parts_of(tmp_path / "out", model=pretrained)["compute_loss_func"] is None
