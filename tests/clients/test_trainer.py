"""transformers' Trainer: the options that users reach for, against a loop written by hand."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peers import (
    CLASSIFIERS,
    NAMES,
    PRETRAINERS,
    arguments,
    batch_of,
    classifier,
    labelled_rows,
    masked_rows,
    pretrainer,
)
from safetensors.torch import load_file
from transformers import Trainer

MODELS = [
    *(pytest.param(partial(classifier, name), labelled_rows, id=f"classifier-{name}") for name in CLASSIFIERS),
    *(pytest.param(partial(pretrainer, name), masked_rows, id=f"pretraining-{name}") for name in PRETRAINERS),
]
BY_NAME = pytest.mark.parametrize("name", CLASSIFIERS)


def trained(model, rows, folder, **options):
    """A copy of the model after Trainer's three steps, and the losses in its log."""
    trainer = Trainer(copy.deepcopy(model), arguments(folder, logging_steps=1, **options), train_dataset=rows)
    trainer.train()
    return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(model, rows, loss_of=None, clip=1.0):
    """A copy of the model after three steps of plain SGD, and the losses."""
    model, batch, losses = copy.deepcopy(model).train(), batch_of(rows), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(3):
        output = model(**batch)
        loss = output.loss if loss_of is None else loss_of(output.logits, batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def assert_same(result, expected):
    (model, losses), (other, other_losses) = result, expected
    assert losses == pytest.approx(other_losses, rel=1e-5)
    weights = dict(other.named_parameters())
    for key, value in model.named_parameters():
        torch.testing.assert_close(value, weights[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remove_unused_columns": False},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"max_grad_norm": 0.01},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize(("make_model", "make_rows"), MODELS)
def test_three_steps_equal_a_loop_by_hand(make_model, make_rows, options, tmp_path):
    start, rows = make_model(), make_rows()
    expected = by_hand(start, rows, clip=options.get("max_grad_norm", 1.0))
    assert_same(trained(start, rows, tmp_path, optim="sgd", **options), expected)


@BY_NAME
def test_label_smoothing_is_that_of_cross_entropy(name, tmp_path):
    start, rows = classifier(name), labelled_rows()
    smooth = partial(F.cross_entropy, label_smoothing=0.1)
    result = trained(start, rows, tmp_path, optim="sgd", label_smoothing_factor=0.1)
    assert_same(result, by_hand(start, rows, smooth))


OPTIMIZERS = {
    "adamw_torch": "linear", "adamw_torch_fused": "cosine", "adafactor": "polynomial", "adagrad": "inverse_sqrt",
    "rmsprop": "cosine_with_restarts",
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        *({"optim": key, "lr_scheduler_type": value, "warmup_steps": 1} for key, value in OPTIMIZERS.items()),
        {"bf16": True, "weight_decay": 0.1, "logging_nan_inf_filter": False},
    ],
    ids=lambda options: options.get("optim", "bf16"),
)
@pytest.mark.parametrize(("make_model", "make_rows"), MODELS)
def test_optimizers_and_schedules_train_every_weight(make_model, make_rows, options, tmp_path):
    start = make_model()
    model, losses = trained(start, make_rows(), tmp_path, **options)
    assert np.isfinite(losses).all()
    before = dict(start.named_parameters())
    unmoved = [
        key for key, value in model.named_parameters() if value.requires_grad and torch.equal(value, before[key])
    ]
    # Dinov2 keeps a mask token that classification doesn't use.
    assert [key for key in unmoved if "mask_token" not in key] == []


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def skip_if_renamed(model, checkpoint):
    """transformers saves its own older models under other names than they have, and its Trainer doesn't map them back.

    The layers that it doesn't find keep the values of the new model, with a warning.
    """
    if load_file(checkpoint / "model.safetensors").keys() != model.state_dict().keys():
        pytest.skip(f"this transformers saves {type(model).__name__} under names that its Trainer can't load")


@BY_NAME
def test_the_best_model_is_loaded_at_the_end(name, tmp_path):
    rows = labelled_rows()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "save_total_limit": 2}
    trainer = Trainer(
        classifier(name), arguments(tmp_path, **options, **best), train_dataset=rows, eval_dataset=rows,
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    skip_if_renamed(trainer.model, tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    scores = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(scores) == 4
    assert trainer.evaluate()["eval_accuracy"] == trainer.state.best_metric == max(scores)


@pytest.mark.parametrize(("make_model", "make_rows"), MODELS)
def test_a_resumed_run_ends_with_the_weights_of_one_without_a_stop(make_model, make_rows, tmp_path):
    start, rows = make_model(), make_rows()
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    whole = Trainer(copy.deepcopy(start), arguments(tmp_path, **options), train_dataset=rows)
    whole.train()
    skip_if_renamed(whole.model, tmp_path / "checkpoint-2")
    resumed = Trainer(make_model(), arguments(tmp_path, **options), train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    expected = dict(whole.model.named_parameters())
    for key, value in resumed.model.named_parameters():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=0)


@BY_NAME
def test_predict_and_the_metrics_options_give_the_models_own_logits(name, tmp_path):
    model, rows = classifier(name), labelled_rows()
    batch = batch_of(rows)
    with torch.no_grad():
        expected = model(**batch)
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return accuracy(prediction)

    options = {"include_for_metrics": ["inputs", "loss"], "eval_accumulation_steps": 1}
    trainer = Trainer(model, arguments(tmp_path, **options), eval_dataset=rows, compute_metrics=metrics)
    result = trainer.predict(rows)
    np.testing.assert_allclose(result.predictions, expected.logits.numpy(), atol=1e-5)
    assert result.label_ids.tolist() == batch["labels"].tolist()
    assert result.metrics["test_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    np.testing.assert_array_equal(seen[0].inputs, batch["pixel_values"].numpy())
    assert trainer.evaluate()["eval_accuracy"] == result.metrics["test_accuracy"]


@BY_NAME
def test_metrics_may_be_gathered_batch_by_batch(name, tmp_path):
    hits = []

    def metrics(prediction, compute_result):
        hits.extend((prediction.predictions.argmax(1) == prediction.label_ids).tolist())
        return {"accuracy": sum(hits) / len(hits)} if compute_result else {}

    model, rows = classifier(name), labelled_rows()
    options = arguments(tmp_path, batch_eval_metrics=True)
    score = Trainer(model, options, eval_dataset=rows, compute_metrics=metrics).evaluate()["eval_accuracy"]
    batch = batch_of(rows)
    with torch.no_grad():
        expected = (model(**batch).logits.argmax(1) == batch["labels"]).float().mean().item()
    assert score == expected
    assert len(hits) == 8


@pytest.mark.parametrize("name", PRETRAINERS)
def test_pretraining_predicts_and_evaluates_beside_a_label_column(name, tmp_path):
    model, rows = pretrainer(name), masked_rows()
    with torch.no_grad():
        expected = model(**batch_of(rows))
    trainer = Trainer(model, arguments(tmp_path, label_names=[]), eval_dataset=rows)
    logits, mask, _ = trainer.predict(rows).predictions[-3:]
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-5)
    np.testing.assert_array_equal(mask, expected.mask.numpy())


def test_our_pretraining_evaluates_its_loss_with_and_without_labels(tmp_path):
    model, rows = pretrainer("ours"), masked_rows()
    with torch.no_grad():
        expected = model(**batch_of(rows)).loss.item()
    for options in ({}, {"remove_unused_columns": False}):
        trainer = Trainer(model, arguments(tmp_path, **options), eval_dataset=rows)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@BY_NAME
def test_model_init_makes_the_model(name, tmp_path):
    options = arguments(tmp_path, max_steps=1)
    trainer = Trainer(args=options, model_init=lambda: classifier(name), train_dataset=labelled_rows())
    assert trainer.train().global_step == 1
    assert trainer.model.config.id2label == NAMES


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem"),
    [
        ([0, 2, 1, 0], 3, "single_label_classification"),
        ([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]], 3, "multi_label_classification"),
        ([0.5, -1.0, 2.0, 0.0], 1, "regression"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@BY_NAME
def test_the_first_labels_decide_the_problem_and_it_is_saved(name, labels, num_labels, problem, tmp_path):
    names = {"id2label": {i: str(i) for i in range(num_labels)}, "label2id": None}
    model = classifier(name, **names)
    rows = [row | {"labels": label} for row, label in zip(labelled_rows(4), labels, strict=True)]
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows, eval_dataset=rows)
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": torch.tensor(labels)}
    with torch.no_grad():
        found = model(batch["pixel_values"]).logits
    expected = {
        "single_label_classification": lambda: F.cross_entropy(found, batch["labels"]),
        "multi_label_classification": lambda: F.binary_cross_entropy_with_logits(found, batch["labels"]),
        "regression": lambda: F.mse_loss(found.squeeze(), batch["labels"]),
    }[problem]()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()
    trainer.save_model()
    assert type(model).from_pretrained(tmp_path).config.problem_type == problem
