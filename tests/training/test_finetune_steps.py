"""Steps of fine-tuning are those of the official recipes, and of a loop by hand."""

import copy

import numpy as np
import pytest
import torch
import yaml
from runs import events, load_finetune_recipe, recipe_names, shipped_recipe, spawn, weights_difference
from tiny import draw_noise, pixels, tiny
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from tunings import arguments, parts_of, tune

from hf_mae import MAEForImageClassification, MAEForPreTraining
from hf_mae.optim.schedule import lr_at

# facts of the original's code; in brackets the paper's Table 9, where it differs: lr 1e-3 and layer decay .75 of B,
# drop path .1 of L and .2 of H
OFFICIAL = {
    "finetune_vit_base_in1k": {"epochs": 100, "blr": 5e-4, "layer_decay": 0.65, "drop_path_rate": 0.1, "lr": 2e-3},
    "finetune_vit_large_in1k": {"epochs": 50, "blr": 1e-3, "layer_decay": 0.75, "drop_path_rate": 0.2, "lr": 4e-3},
    "finetune_vit_huge_in1k": {"epochs": 50, "blr": 1e-3, "layer_decay": 0.75, "drop_path_rate": 0.3, "lr": 4e-3},
}


OF_ALL = {
    "dataset": "ILSVRC/imagenet-1k", "total_batch_size": 1024, "warmup_epochs": 5, "min_lr": 1e-6, "weight_decay": 0.05,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "crop_scale": [0.08, 1.0], "flip": True,
    "rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0,
    "label_smoothing": 0.1, "pooling": "mean", "trainable_positions": True, "trainable_blocks": "all",
    "clip_grad": None, "ema_decay": None, "eval_crop_pct": None,
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_recipes_have_the_originals_values(name):
    recipe = load_finetune_recipe(["--recipe", name, "--model", "m"])
    for key, value in {**OF_ALL, **OFFICIAL[name]}.items():
        assert getattr(recipe, key) == value, key
    total, warmup = recipe.steps(1_281_167)
    assert total == round(recipe.epochs * 1_281_167 / 1024)
    assert warmup == pytest.approx(5 * 1_281_167 / 1024, abs=1)
    # Written down in the file, not left to defaults that may change.
    written = set(shipped_recipe(name))
    assert written >= {key for key in {**OF_ALL, **OFFICIAL[name]} if OF_ALL.get(key, 0) is not None} - {
        "lr", "trainable_blocks",
    }  # fmt: skip


def test_all_recipes_of_fine_tuning_are_shipped_and_load():
    assert recipe_names("finetune") == ["finetune_cifar10_tiny", "finetune_quickstart", *sorted(OFFICIAL)]
    for name in recipe_names("finetune"):
        recipe = load_finetune_recipe(["--recipe", name, "--model", "m"])
        assert recipe.output_dir == f"outputs/{name}"
        flat = recipe.to_dict()
        assert {key: flat[key] for key in shipped_recipe(name)} == shipped_recipe(name)


class Recorder:
    """A collator that remembers what it is given, before anything is mixed."""

    def __init__(self, collator):
        self.collator, self.batches = collator, []

    def __call__(self, samples):
        if "rng" in samples[0]:
            self.batches.append([torch.stack([s[key] for s in samples]) for key in ("pixel_values", "labels")])
        return self.collator(samples)


def seed_drop_path(model, steps: int = 0):
    """The n-th training forward draws the same numbers in every copy of a model."""
    counter = iter(range(steps, 100))

    def seed(module, inputs):
        if module.training:
            torch.manual_seed(next(counter))

    model.register_forward_pre_hook(seed)
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "base" not in name else []) for name in OFFICIAL]
)
def test_steps_of_an_official_recipe_are_those_of_a_loop_by_hand(name, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape=(): torch.tensor(0.3))
    keys = {"recipe": name, "model": pretrained, "max_samples": None, "total_batch_size": None, "crop_scale": None}
    keys |= {"total_steps": 4, "warmup_steps": 2, "rand_augment": "none", "per_device_batch_size": 1024}
    parts = parts_of(tmp_path / "out", **keys)
    official = OFFICIAL[name]
    parts["data_collator"].mixing.ways = parts["data_collator"].mixing.ways[:1]  # mixup, whose weight is known
    parts["data_collator"] = recorder = Recorder(parts["data_collator"])
    parts["args"].eval_on_start = False
    by_hand = seed_drop_path(copy.deepcopy(parts["model"])).train()
    assert by_hand.config.drop_path_rate == official["drop_path_rate"]
    assert [layer.drop_path.rate for layer in by_hand.mae.layers] == [0, official["drop_path_rate"]]
    seed_drop_path(parts["model"])
    Trainer(**parts).train()

    assert [len(images) for images, _ in recorder.batches] == [1024] * 4  # whole batches alone, of 1,707 images
    start_weights = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
    moments = {name: (torch.zeros_like(p).double(), torch.zeros_like(p).double()) for name, p in start_weights.items()}
    rates = [0, official["lr"] / 2, official["lr"], 1e-6 + (official["lr"] - 1e-6) / 2]
    layer = {"mae.embeddings": 0, "mae.layers.0": 1, "mae.layers.1": 2, "fc_norm": 3, "classifier": 3}
    for step, (images, labels) in enumerate(recorder.batches):
        soft = 0.9 * F.one_hot(labels, 10).float() + 0.01
        soft = 0.3 * soft + 0.7 * soft.roll(1, 0)
        mixed = 0.3 * images + 0.7 * images.roll(1, 0)
        by_hand.zero_grad()
        F.cross_entropy(by_hand(pixel_values=mixed).logits, soft).backward()
        for name, parameter in by_hand.named_parameters():
            first, second = moments[name]
            gradient = parameter.grad.double()
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.999).add_(gradient**2, alpha=0.001)
            update = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            (number,) = (n for prefix, n in layer.items() if name.startswith(f"{prefix}."))
            lr = rates[step] * official["layer_decay"] ** (3 - number)
            spared = parameter.ndim == 1 or name in ("mae.embeddings.cls_token",
                                                     "mae.embeddings.position_embeddings.table")  # fmt: skip
            with torch.no_grad():
                new = parameter.double() * (1 if spared else 1 - lr * 0.05) - lr * update
                parameter.copy_(new)
    trained = dict(parts["model"].named_parameters())
    assert trained.keys() == start_weights.keys()
    for name, parameter in by_hand.named_parameters():
        assert (trained[name] - start_weights[name]).abs().max() > 1e-4, name
        assert (trained[name] - parameter).abs().max() < 1e-6, name


def test_the_learning_rate_of_every_step_and_group_is_the_schedules(pretrained, tmp_path):
    parts = parts_of(tmp_path / "out", model=pretrained, total_steps=12, warmup_steps=3, layer_decay=0.5)
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append([group["lr"] for group in optimizer.param_groups])

    parts["callbacks"].append(Look())
    Trainer(**parts).train()
    lr = 1e-3 * 32 / 256
    assert len(seen) == 12
    for step, rates in enumerate(seen):
        head = lr_at(step, lr, 3, 12, 1e-6)
        expected = [head * 0.5**power for power in range(4) for _ in range(2)]
        assert rates == pytest.approx(expected, rel=1e-9, abs=1e-15), step


def test_eight_images_at_once_are_four_and_four(pretrained, tmp_path):
    logs = []
    for size in (8, 4):
        out = tune(
            tmp_path / f"out{size}", model=pretrained, total_batch_size=8, per_device_batch_size=size, total_steps=4,
            label_smoothing=0.1, drop_path_rate=0, blr=0.05,
        )  # fmt: skip
        logs.append([event for event in events(out) if "loss" in event])
    assert yaml.safe_load((tmp_path / "out4" / "run_config.yaml").read_text())["derived"]["grad_accum_steps"] == 2
    for whole, halves in zip(*logs, strict=True):
        assert halves["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert halves["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    assert len({round(event["loss"], 3) for event in logs[0]}) == 4  # of different images and weights


class Samples(Dataset):
    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["pixel_values"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


def stock_logs(tmp_path, model, dataset, size: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of three steps of 8 images under a stock Trainer."""
    args = TrainingArguments(
        str(tmp_path / f"out{size}"), per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
        max_steps=3, logging_steps=1, learning_rate=1e-2, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(copy.deepcopy(model), args, train_dataset=dataset)
    trainer.train()
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("kind", ["hard", "soft", "multi-label", "regression", "pretraining"])
def test_a_stock_trainer_accumulates_every_kind_of_loss_rightly(kind, tmp_path):
    if kind == "pretraining":
        model, columns = tiny(MAEForPreTraining), {"noise": draw_noise(24)}
    else:
        problem = {"multi-label": "multi_label_classification", "regression": "regression"}.get(kind)
        model = tiny(MAEForImageClassification, num_labels=3, problem_type=problem)
        labels = {
            "hard": torch.arange(24) % 3, "soft": torch.rand(24, 3).softmax(dim=1),
            "multi-label": torch.randint(2, (24, 3)).float(), "regression": torch.randn(24, 3),
        }[kind]  # fmt: skip
        columns = {"labels": labels}
    dataset = Samples(pixel_values=pixels(24), **columns)
    whole, halves = (stock_logs(tmp_path, model, dataset, size) for size in (8, 4))
    assert len(whole) == 3
    np.testing.assert_allclose(halves, whole, rtol=2e-5)


def test_soft_labels_of_one_class_are_hard_labels():
    model = tiny(MAEForImageClassification, num_labels=5)
    images, labels = pixels(4), torch.tensor([0, 4, 2, 2])
    hard = model(images, labels=labels).loss
    soft = model(images, labels=F.one_hot(labels, 5).float()).loss
    by_hand = -model(images).logits.log_softmax(dim=1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(hard, by_hand)
    torch.testing.assert_close(soft, by_hand)


@pytest.mark.slow
@pytest.mark.parametrize("class_weights", [None, "balanced"])
def test_two_processes_take_the_steps_of_one(class_weights, pretrained, tmp_path):
    keys = {"model": pretrained, "class_weights": class_weights, "max_samples": 250}
    keys |= {"drop_path_rate": 0, "label_smoothing": 0.1, "blr": 0.05}
    one = tune(tmp_path / "one", **keys)
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_mae.cli", "finetune"]
    log = tmp_path / "log.txt"
    two = spawn([*command, *arguments(tmp_path / "two", **keys)], log, ACCELERATE_USE_CPU="true")
    assert two.wait(300) == 0, log.read_text()
    assert "2 processes x 1 x 16" in log.read_text()
    losses = [[event["loss"] for event in events(folder) if "loss" in event] for folder in (one, tmp_path / "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert weights_difference(one, tmp_path / "two") < 1e-4
