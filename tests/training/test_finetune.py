import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import (
    events,
    load_finetune_recipe,
    recipe_names,
    run,
    shipped_recipe,
    spawn,
    start,
    weights_difference,
    weights_hash,
)
from safetensors.torch import load_file
from tiny import draw_noise, pixels, tiny, tiny_config
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments, pipeline

from hf_mae import MAEForImageClassification, MAEForPreTraining, MAEImageProcessor
from hf_mae.errors import UserError
from hf_mae.keys.finetune_keys import FinetuneRecipe
from hf_mae.optim.schedule import lr_at
from hf_mae.run_folder import add_result, read_results
from hf_mae.training.finetune import trainer_parts

# A second of fine-tuning on the digits.
TINY_TUNING = {
    "dataset": "digits",
    "crop_scale": [0.7, 1.0],
    "flip": False,
    "eval_crop_pct": 1.0,
    "max_samples": 256,
    "total_batch_size": 32,
    "total_steps": 8,
    "num_workers": 0,
    "log_steps": 1,
    "save_steps": 4,
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    """A tiny model of the digits. Without biases of attention keys, whose gradient is rounding alone."""
    return str(run(tmp_path_factory.mktemp("pretrained") / "model", total_steps=2, qkv_bias=False))


def arguments(output_dir, **keys) -> list[str]:
    """The command line of a tiny fine-tuning; a key that is None is left out."""
    words = []
    for key, value in {**TINY_TUNING, "output_dir": output_dir, **keys}.items():
        if value is not None:
            words += [f"--{key}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def tune(output_dir, **keys) -> Path:
    assert start("finetune", *arguments(output_dir, **keys)) == 0
    return Path(output_dir)


def parts_of(output_dir, **keys) -> dict:
    return trainer_parts(load_finetune_recipe(arguments(output_dir, **keys)))


def results(folder) -> dict:
    """The only entry of a run's results.json."""
    (entry,) = json.loads((Path(folder) / "results.json").read_text())
    return entry


# ------------------------------------------------------------------------------------------ the official recipes

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
    assert recipe_names("finetune_") == ["finetune_cifar10_tiny", "finetune_quickstart", *sorted(OFFICIAL)]
    for name in recipe_names("finetune_"):
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


@pytest.mark.parametrize("name", OFFICIAL)
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

    assert [len(images) for images, _ in recorder.batches] == [1024] * 4  # whole batches alone, of 1,705 images
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


# ------------------------------------------------------------------------------------------ accumulation


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
    assert logs[0][0]["loss"] != pytest.approx(logs[0][-1]["loss"], rel=1e-3)


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
def test_two_processes_take_the_steps_of_one(pretrained, tmp_path):
    keys = {"model": pretrained, "drop_path_rate": 0, "label_smoothing": 0.1, "blr": 0.05, "max_samples": 250}
    one = tune(tmp_path / "one", **keys)
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_mae.cli", "finetune"]
    log = tmp_path / "log.txt"
    two = spawn([*command, *arguments(tmp_path / "two", **keys)], log, ACCELERATE_USE_CPU="true")
    assert two.wait(300) == 0, log.read_text()
    assert "2 processes x 1 x 16" in log.read_text()
    losses = [[event["loss"] for event in events(folder) if "loss" in event] for folder in (one, tmp_path / "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert weights_difference(one, tmp_path / "two") < 1e-4


# ------------------------------------------------------------------------------------------ a run


def test_a_run_ends_as_a_model_folder_that_the_pipeline_loads(pretrained, tmp_path, capsys):
    out = tune(tmp_path / "out", model=pretrained, total_steps=60, total_batch_size=64, blr=0.02, drop_path_rate=0,
               log_steps=20, layer_decay=0.9, max_samples=None)  # fmt: skip
    files = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert files == {"config.json", "metrics.jsonl", "model.safetensors", "preprocessor_config.json", "results.json",
                     "run_config.yaml"}  # fmt: skip
    printed = capsys.readouterr().out
    assert "1,705 images of digits, 1 x 8 x 8 uint8, 10 classes" in printed
    assert "60 steps of 64 images = 1 process x 1 x 64" in printed
    assert f"pipeline('image-classification', '{out}')" in printed
    figures = results(out)["figures"]
    assert figures["top1"] > 40  # ten classes
    assert results(out)["protocol"]["name"] == "fine-tuning"
    assert results(out)["protocol"]["start"] == pretrained
    assert results(out)["checkpoint"] == {"path": str(out), "sha256": weights_hash(out)}
    assert results(out)["data"]["eval_images"] == 92
    logged = events(out)
    assert [event["step"] for event in logged if "eval_loss" in event] == [*range(0, 61, 6)]
    assert [event["step"] for event in logged if "loss" in event] == [20, 40, 60]
    assert {"images_seen", "epoch", "lr", "grad_norm", "images_per_second", "data_wait"} <= set(logged[-2])

    classify = pipeline("image-classification", str(out))
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    image = Image.fromarray(np.rint(digits.images[3] * 255 / 16).astype(np.uint8))
    best = classify(image)[0]
    assert set(best) == {"label", "score"}
    assert best["label"] in [str(i) for i in range(10)]
    # Scored anew, from the folder alone.
    assert start("evaluate", "classification", "--model", out, "--dataset", "digits", "--num_workers", 0) == 0
    again = json.loads((Path(out) / "results.json").read_text())[-1]
    assert again["protocol"]["name"] == "classification"
    assert again["figures"] == pytest.approx({key: value for key, value in figures.items() if key != "loss"})
    assert again["data"]["eval_images"] == 92


def test_a_finished_run_says_so_again_and_is_not_run_again(pretrained, tmp_path, capsys):
    out = tune(tmp_path / "out", model=pretrained)
    before = (out / "model.safetensors").stat().st_mtime_ns
    first = capsys.readouterr().out.splitlines()[-4:]
    assert start("finetune", *arguments(out, model=pretrained, resume="auto")) == 0
    assert capsys.readouterr().out.splitlines() == first
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert start("finetune", *arguments(out, model=pretrained)) == 2
    assert "holds another run; go on with it by --resume auto" in capsys.readouterr().err


class Stop(Exception):
    pass


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(ema_decay, pretrained, tmp_path, monkeypatch):
    keys = {"model": pretrained, "mixup": 0.8, "cutmix": 1.0, "drop_path_rate": 0.3, "random_erasing": 0.5}
    keys |= {"total_steps": 12, "save_steps": 5, "eval_steps": 3, "ema_decay": ema_decay}
    whole = tune(tmp_path / "whole", **keys)
    from hf_mae.training.callbacks import LogCallback

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(LogCallback, "on_step_begin", stop)
        with pytest.raises(Stop):
            start("finetune", *arguments(tmp_path / "cut", **keys))
    assert (tmp_path / "cut" / "checkpoint-5").is_dir()
    cut = tune(tmp_path / "cut", **keys, resume="auto")
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-6
    losses = [{event["step"]: event["loss"] for event in events(folder) if "loss" in event} for folder in (whole, cut)]
    assert losses[0].keys() == losses[1].keys() == set(range(1, 13))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_averaged_weights_are_what_is_scored_and_saved(pretrained, tmp_path):
    parts = parts_of(tmp_path / "out", model=pretrained, ema_decay=0.9, total_steps=6, blr=0.05, eval_steps=4,
                     warmup_steps=1)  # fmt: skip
    model = parts["model"]
    weights = [{name: p.detach().clone() for name, p in model.named_parameters()}]

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

    parts["callbacks"].append(Look())
    trainer = Trainer(**parts)
    trainer.train()
    average = weights[0]
    averages = [average]
    for step in weights[1:]:
        average = {name: 0.9 * average[name] + 0.1 * step[name] for name in average}
        averages.append(average)
    assert len(weights) == 7
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), average[name], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(parameter, weights[-1][name], atol=1e-5), name
    logged = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert set(logged) == {0, 4, 6}
    for step in (4, 6):  # a score in between is of the average, and leaves the weights as they are
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(averages[step][name])
        assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[step], rel=1e-5)


def test_the_average_is_what_the_command_saves(pretrained, tmp_path):
    plain, averaged = (
        load_file(tune(tmp_path / str(decay), model=pretrained, ema_decay=decay, total_steps=1, warmup_steps=0,
                       blr=0.05) / "model.safetensors")
        for decay in (None, 0.75)
    )  # fmt: skip
    first = load_file(Path(pretrained) / "model.safetensors")
    name = "mae.layers.1.mlp.fc1.weight"
    torch.testing.assert_close(averaged[name], 0.75 * first[name] + 0.25 * plain[name], atol=1e-6, rtol=1e-5)
    assert (plain[name] - first[name]).abs().max() > 1e-4


@pytest.mark.parametrize(("blocks", "trained"), [("0", 0), ("0.5", 0.5), ("1", 1), ("all", 2)])
def test_partial_fine_tuning_leaves_the_rest_of_the_model_bit_by_bit(blocks, trained, pretrained, tmp_path):
    out = tune(tmp_path / "out", model=pretrained, trainable_blocks=blocks, warmup_steps=0, total_steps=2)
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (pretrained, out))
    changed = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    half = {name for name in before if name.startswith(("mae.layers.1.mlp.", "mae.layers.1.norm2."))}
    block = {name for name in before if name.startswith("mae.layers.1.")}
    everything = {name for name in before if name.startswith("mae.") and not name.startswith("mae.norm")}
    assert changed == {0: set(), 0.5: half, 1: block, 2: everything}[trained]
    assert after["classifier.weight"].abs().max() > 1e-4  # started at 2e-5
    assert not torch.equal(after["fc_norm.weight"], torch.ones(32))


@pytest.mark.parametrize("trainable", [True, False])
def test_positions_train_if_the_recipe_says_so(trainable, pretrained, tmp_path):
    out = tune(tmp_path / "out", model=pretrained, trainable_positions=trainable, warmup_steps=0, total_steps=1)
    key = "mae.embeddings.position_embeddings.table"
    before, after = (load_file(Path(folder) / "model.safetensors")[key] for folder in (pretrained, out))
    assert torch.equal(before, after) is not trainable
    assert json.loads((out / "config.json").read_text())["trainable_positions"] is trainable
    model = AutoModelForImageClassification.from_pretrained(out)
    assert torch.equal(model.mae.embeddings.position_embeddings.table, after)  # loaded as it was trained


def test_another_image_size_than_in_pretraining(pretrained, tmp_path):
    out = tune(tmp_path / "out", model=pretrained, image_size="16x12", eval_crop_pct=0.5, total_steps=1)
    model = AutoModelForImageClassification.from_pretrained(out)
    assert model.config.image_size == [16, 12]
    assert model.mae.embeddings.position_embeddings.table.shape == (1 + 8 * 6, 32)
    processor = MAEImageProcessor.from_pretrained(out)
    assert (processor.crop_size["height"], processor.crop_size["width"]) == (16, 12)
    assert (processor.size["height"], processor.size["width"]) == (32, 24)
    assert processor.image_mean == MAEImageProcessor.from_pretrained(pretrained).image_mean


@pytest.mark.parametrize(("size", "resize"), [("224", 256), ("448", 448), ("8", 9)])
def test_the_scoring_crop_is_224_of_256_and_all_of_larger_images(size, resize, pretrained, tmp_path):
    parts = parts_of(tmp_path / "out", model=pretrained, image_size=size, eval_crop_pct=None, max_eval_samples=2)
    assert parts["processing_class"].size["shortest_edge"] == resize
    assert parts["eval_dataset"][0]["pixel_values"].shape == (1, int(size), int(size))


def test_a_fine_tuned_model_goes_on_with_its_head_or_gets_a_new_one(pretrained, tmp_path):
    out = tune(tmp_path / "out", model=pretrained, warmup_steps=0)
    parts = parts_of(tmp_path / "again", model=out)
    stored = load_file(out / "model.safetensors")
    assert torch.equal(parts["model"].classifier.weight, stored["classifier.weight"])
    assert torch.equal(parts["model"].fc_norm.weight, stored["fc_norm.weight"])
    anew = parts_of(tmp_path / "anew", model=out, reset_head=True)["model"]
    assert float(anew.classifier.weight.std().detach()) == pytest.approx(2e-5, rel=0.15)
    assert stored["classifier.weight"].std() > 1e-4
    assert torch.equal(anew.fc_norm.weight, stored["fc_norm.weight"])


def test_a_recipe_in_python_needs_no_command_line(pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = trainer_parts(FinetuneRecipe(model=pretrained, total_steps=3, warmup_steps=1, max_samples=64))
    trainer = Trainer(**parts)
    trainer.train()
    assert trainer.state.global_step == 3
    assert parts["args"].output_dir == "outputs/finetune"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mixed_precision", "bf16"),
        ("gradient_checkpointing", True),
        ("pooling", "cls"),
        ("attn_implementation", "eager"),
    ],
)  # fmt: skip
def test_a_run_gets_through_with(key, value, pretrained, tmp_path):
    out = tune(tmp_path / "out", model=pretrained, **{key: value}, total_steps=2)
    recipe = yaml.safe_load((out / "run_config.yaml").read_text())["recipe"]
    assert recipe[key] == value
    assert all(math.isfinite(event["loss"]) for event in events(out) if "loss" in event)
    assert load_file(out / "model.safetensors")["classifier.weight"].dtype == torch.float32


def test_dry_run_writes_nothing(pretrained, tmp_path, capsys):
    assert start("finetune", *arguments(tmp_path / "out", model=pretrained, dry_run=True)) == 0
    assert "8 steps of 32 images" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ other problems


def folder_of_images(root: Path, labels: list, colours: list[tuple[int, int, int]], column: str = "label") -> str:
    """A parquet file of 8 x 8 images in colours with a little noise, with any kind of label."""
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(np.clip(np.array(colour) + rng.integers(-20, 20, (8, 8, 3)), 0, 255).astype(np.uint8))
        for colour in colours
    ]
    features = datasets.Dataset.from_dict({column: labels}).features
    features["image"] = datasets.Image()
    root.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict({"image": images, column: labels}, features=features)
    table.to_parquet(str(root / "train.parquet"))
    table.select(range(0, len(labels), 3)).to_parquet(str(root / "validation.parquet"))
    return str(root)


@pytest.fixture(scope="module")
def colourful(tmp_path_factory) -> str:
    """A tiny model of 8 x 8 colour images."""
    out = tmp_path_factory.mktemp("colourful")
    rng = np.random.default_rng(1)
    colours = [tuple(rng.integers(0, 255, 3).tolist()) for _ in range(64)]
    data = folder_of_images(out / "data", [0] * 64, colours)
    return str(run(out / "model", dataset=data, total_steps=2, total_batch_size=16))


FAST = {"total_steps": 40, "total_batch_size": 32, "blr": 0.04, "drop_path_rate": 0, "crop_scale": [1, 1],
        "layer_decay": 1.0}  # fmt: skip


def test_several_labels_an_image(colourful, tmp_path, capsys):
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, (90, 3)).tolist()
    data = folder_of_images(tmp_path / "data", labels, [tuple(200 if bit else 40 for bit in row) for row in labels],
                            "tags")  # fmt: skip
    out = tune(tmp_path / "out", **FAST, model=colourful, dataset=data, label_column="tags",
               problem_type="multi_label_classification")  # fmt: skip
    figures = results(out)["figures"]
    assert {"loss", "map", "auroc"} <= set(figures)
    assert figures["map"] > 0.9
    config = json.loads((out / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    capsys.readouterr()
    words = ["--model", out, "--dataset", data, "--label_column", "tags", "--num_workers", 0]
    assert start("evaluate", "classification", *words) == 0
    again = json.loads((Path(out) / "results.json").read_text())[-1]
    assert again["protocol"]["name"] == "classification"
    assert again["figures"]["auroc"] == pytest.approx(figures["auroc"])
    assert again["data"]["evaluated_on"] == f"split validation of {data}"


def test_numbers_of_an_image(colourful, tmp_path, capsys):
    values = np.random.default_rng(3).uniform(0, 1, 90).round(3).tolist()
    data = folder_of_images(tmp_path / "data", values, [(int(40 + 160 * v),) * 3 for v in values], "brightness")
    out = tune(tmp_path / "out", **FAST, model=colourful, dataset=data, label_column="brightness",
               problem_type="regression")  # fmt: skip
    figures = results(out)["figures"]
    assert figures["mae"] < 0.12  # the mean alone would be off by 0.25
    assert "1 numbers an image" in capsys.readouterr().out
    words = ["--model", out, "--dataset", data, "--label_column", "brightness", "--num_workers", 0]
    assert start("evaluate", "classification", *words) == 0
    assert json.loads((Path(out) / "results.json").read_text())[-1]["figures"]["mae"] == pytest.approx(
        figures["mae"], rel=1e-4
    )


def class_folders(root: Path, names=("ant", "bee"), count: int = 40) -> str:
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(count):
            Image.new("RGB", (12, 9), (200 * i, 6 * j, 90)).save(root / name / f"{j}.png")
    return str(root)


def test_broken_images_are_named_and_do_not_end_the_run(colourful, tmp_path, capsys):
    data = Path(class_folders(tmp_path / "train"))
    scored = Path(class_folders(tmp_path / "test"))
    (data / "ant" / "2.png").write_bytes(b"not an image")
    (scored / "bee" / "1.png").write_bytes(b"")
    out = tune(tmp_path / "out", model=colourful, dataset=data, eval_dataset=scored, total_batch_size=4, total_steps=21)
    printed = capsys.readouterr().out
    assert "1 images can't be decoded and are not scored, the first: bee/1.png" in printed
    assert f"2 images could not be decoded: {out}/bad_samples.jsonl" in printed
    bad = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert bad == [
        {"key": "ant/2.png", "reason": "UnidentifiedImageError"},
        {"key": "bee/1.png", "reason": "EmptyFile"},
    ]
    assert results(out)["data"]["eval_images"] == 79
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "ant", "1": "bee"}


# ------------------------------------------------------------------------------------------ mistakes


def mistake(capsys, *words) -> str:
    assert start(*words) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("hf-mae: error: ")
    assert not any("Traceback" in line for line in printed)
    return printed[-1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": None}, "no model is given; pass --model"),
        ({"model": "there/is/none"}, "--model there/is/none can't be loaded"),
        ({"trainable_blocks": 3}, "trainable_blocks 3 is none of 0, 0.5, 1 to 2, or all; choose one of these"),
        ({"trainable_blocks": "most"}, "trainable_blocks most is none of"),
        ({"recipe": "quickstart"}, "unknown recipe 'quickstart'; did you mean 'finetune_quickstart'?"),
        ({"mixup": 0.8, "problem_type": "regression"}, "mixup is for one class an image, not for regression; pass --"),
        ({"problem_type": "multi_label_classification"}, "pass --problem_type single_label_classification"),
        ({"layer_decay": 1.5}, "layer_decay 1.5 is out of range; give a number in [0, 1]"),
        ({"blr": 0}, "blr 0.0 is not positive"),
        ({"image_size": 7}, "image_size 7x7 is not a multiple of patch_size 2x2; the nearest that fits is"),
        ({"total_batch_size": 30, "per_device_batch_size": 16}, "is not a multiple of per_device_batch_size 16"),
        ({"eval_split": "test"}, "digits has no split 'test'; choose one of: train"),
        ({"layer_decy": 0.5}, "unknown argument '--layer_decy'; did you mean '--layer_decay'?"),
        ({"rand_augment": "strong"}, "rand_augment strong is nothing that timm knows"),
        ({"resume": "there/is/none"}, "there/is/none is no complete checkpoint (trainer_state.json in it); name anoth"),
        ({"mixed_precision": "fp16"}, "mixed_precision fp16 needs a GPU; use bf16 or no"),
        ({"log_with": "paper"}, "log_with paper is not installed"),
    ],
)
def test_mistakes_get_one_line_with_the_remedy(keys, message, pretrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if "rand_augment" in keys:
        pytest.importorskip("timm", reason="timm is not installed: pip install 'hf-mae[train]'")
    words = arguments(tmp_path / "out", **{"model": pretrained, **keys})
    assert message in mistake(capsys, "finetune", *words)
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_added_to_are_reported_before_the_training(pretrained, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("mine")
    assert "is no list of results of hf-mae; move it away" in mistake(
        capsys, "finetune", *arguments(out, model=pretrained)
    )
    assert [path.name for path in out.iterdir()] == ["results.json"]


def test_other_results_in_the_folder_are_not_taken_for_those_of_the_run(pretrained, tmp_path):
    other = {"protocol": {"name": "knn"}, "data": {}, "checkpoint": {}, "figures": {"knn_top1": 50.0}}
    add_result(other, tmp_path / "out" / "results.json")
    out = tune(tmp_path / "out", model=pretrained, resume="auto", total_steps=1)
    assert [entry["protocol"]["name"] for entry in read_results(out / "results.json")] == ["knn", "fine-tuning"]


def test_data_that_does_not_fit_gets_one_line_with_the_remedy(colourful, pretrained, tmp_path, capsys):
    cases = [
        (class_folders(tmp_path / "one", ["ant"]), "have no label; sort images into one folder a class"),
        (folder_of_images(tmp_path / "same", [4] * 9, [(9, 9, 9)] * 9), "has one class only (4); two or more are need"),
    ]
    for data, message in cases:
        words = arguments(tmp_path / "out", model=colourful, dataset=data)
        assert message in mistake(capsys, "finetune", *words)
    data = class_folders(tmp_path / "two")
    out = tune(tmp_path / "tuned", model=colourful, dataset=data, total_batch_size=4, total_steps=1)
    other = class_folders(tmp_path / "other", ["cow", "bee", "emu"])
    error = mistake(capsys, "finetune", *arguments(tmp_path / "out", model=out, dataset=other))
    assert (
        f"{out} knows the classes ant, bee, {other} has bee, cow, emu; pass --reset_head true for a new head" in error
    )
    error = mistake(capsys, "evaluate", "classification", "--model", out, "--dataset", other, "--eval_split", "train")
    assert "has the label cow, which is none of the model's 2 classes (ant, bee)" in error
    error = mistake(capsys, "evaluate", "classification", "--model", colourful, "--dataset", data)
    assert f"{colourful} has no classifier; make one by hf-mae finetune --model {colourful}" in error
    bands = tmp_path / "bands"
    for i in range(4):
        (bands / "xy"[i % 2]).mkdir(parents=True, exist_ok=True)
        np.save(bands / "xy"[i % 2] / f"{i}.npy", np.zeros((5, 8, 8), dtype=np.uint8))
    error = mistake(
        capsys, "finetune", *arguments(tmp_path / "out", model=colourful, dataset=bands, eval_dataset=bands)
    )
    assert "have 5 channels, the model 3; go on pretraining it on such images first" in error
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_kind_is_no_mae(pretrained, tmp_path, capsys):
    folder = tmp_path / "vit"
    shutil.copytree(pretrained, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(folder / "model.safetensors")
    from safetensors.torch import save_file

    save_file({name: weights[name] for name in list(weights)[:8]}, folder / "model.safetensors", {"format": "pt"})
    error = mistake(capsys, "finetune", *arguments(tmp_path / "out", model=folder))
    assert "of the encoder's weights, mae." in error


def test_without_timm_the_error_names_the_extra(pretrained, tmp_path, capsys, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    words = arguments(tmp_path / "out", model=pretrained, rand_augment="rand-m9-mstd0.5-inc1")
    assert "hf-mae finetune needs the package timm: pip install 'hf-mae[train]'" in mistake(capsys, "finetune", *words)


def test_a_loss_that_is_no_number_ends_the_run_with_one_line(pretrained, tmp_path, capsys):
    words = arguments(tmp_path / "out", model=pretrained, blr=1e30, warmup_steps=0)
    assert "the loss is nan at step" in mistake(capsys, "finetune", *words)


def test_recipes_check_their_values():
    with pytest.raises(UserError, match=r"label_smoothing 2\.0 is out of range"):
        load_finetune_recipe(["--model", "m", "--label_smoothing", "2"])
    assert math.isclose(load_finetune_recipe(["--model", "m"]).lr, 1e-3)
    assert tiny_config(num_labels=3).num_labels == 3


def test_determinism_is_asked_of_torch(pretrained, tmp_path):
    assert not torch.are_deterministic_algorithms_enabled()
    before = torch.backends.cuda.mem_efficient_sdp_enabled()
    try:
        parts_of(tmp_path / "out", model=pretrained, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_mem_efficient_sdp(before)
