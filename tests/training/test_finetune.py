"""Runs of `hf-mae finetune`: their files, other problems, and mistakes."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import yaml
from PIL import Image
from runs import events, load_finetune_recipe, mistake, recipe_names, run, start, weights_hash
from safetensors.torch import load_file
from tiny import tiny_config
from transformers import AutoModelForImageClassification, Trainer, pipeline
from tunings import arguments, parts_of, results, tune

from hf_mae import MAEImageProcessor
from hf_mae.data.sources import open_splits
from hf_mae.errors import UserError
from hf_mae.keys.finetune_keys import FinetuneRecipe
from hf_mae.run_folder import add_result, read_results
from hf_mae.training.finetune import trainer_parts


def test_a_run_ends_as_a_model_folder_that_the_pipeline_loads(pretrained, tmp_path, capsys):
    out = tune(tmp_path / "out", model=pretrained, total_steps=60, total_batch_size=64, blr=0.02, drop_path_rate=0,
               log_steps=20, layer_decay=0.9, max_samples=None)  # fmt: skip
    files = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert files == {"config.json", "metrics.jsonl", "model.safetensors", "preprocessor_config.json", "results.json",
                     "run_config.yaml"}  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.startswith("data     digits (only one split): 1,707 images of split train, evaluated on 90 images: ")
    assert "; labels: 10 classes from scikit-learn\nimages   1 channel of 8 bits (uint8), 8 x 8 pixels" in printed
    assert "60 steps of 64 images = 1 process x 1 x 64" in printed
    assert f"pipeline('image-classification', '{out}')" in printed
    figures = results(out)["figures"]
    assert figures["top1"] > 40  # ten classes
    assert results(out)["protocol"]["name"] == "fine-tuning"
    assert results(out)["protocol"]["start"] == pretrained
    assert results(out)["checkpoint"] == {"path": str(out), "sha256": weights_hash(out)}
    assert results(out)["data"]["eval_images"] == 90
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
    tuned = results(out)
    assert start("evaluate", "classification", "--model", out, "--dataset", "digits", "--num_workers", 0) == 0
    again = json.loads((Path(out) / "results.json").read_text())[-1]
    assert again["protocol"]["name"] == "classification"
    assert again["figures"] == pytest.approx({key: value for key, value in figures.items() if key != "loss"})
    assert again["data"]["eval_images"] == 90
    assert again["per_class"] == tuned["per_class"]
    assert sum(table["support"] for table in again["per_class"].values()) == 90
    assert again["intervals"] == tuned["intervals"]
    low, high = again["intervals"]["top1"]
    assert low < figures["top1"] < high


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_run_writes_its_predictions_for_the_images_that_it_is_scored_on(pretrained, tmp_path, ending):
    file = tmp_path / f"said.{ending}"
    out = tune(tmp_path / "out", model=pretrained, max_samples=None, predictions=file)
    said = pandas.read_csv(file) if ending == "csv" else pandas.read_parquet(file)
    assert len(said) == results(out)["data"]["eval_images"] == 90
    assert said.key[0].startswith("digits#")
    right = said.label.astype(str) == said.prediction.astype(str)
    assert results(out)["figures"]["top1"] == pytest.approx(100 * right.mean())
    scores = said.filter(like="score_")
    assert scores.idxmax(axis=1).str.removeprefix("score_").tolist() == said.prediction.astype(str).tolist()
    assert scores.sum(axis=1).to_numpy() == pytest.approx(1)


def test_a_finished_run_says_so_again_and_is_not_run_again(pretrained, tmp_path, capsys):
    out = tune(tmp_path / "out", model=pretrained)
    before = (out / "model.safetensors").stat().st_mtime_ns
    first = capsys.readouterr().out
    assert start("finetune", *arguments(out, model=pretrained, resume="auto")) == 0
    again = capsys.readouterr().out
    assert again.startswith("evaluated on 90 images\n")
    assert first.endswith(again)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert start("finetune", *arguments(out, model=pretrained)) == 2
    assert "holds another run; continue it with --resume auto" in capsys.readouterr().err
    late = arguments(out, model=pretrained, resume="auto", predictions=tmp_path / "said.csv")
    assert f"is finished, and only a run writes predictions; use hf-mae evaluate classification --model {out} --pr" in (
        mistake(capsys, "finetune", *late)
    )


def test_predictions_that_cannot_be_written_are_an_error_before_the_first_step(pretrained, tmp_path, capsys):
    (tmp_path / "folder.csv").mkdir()
    words = arguments(tmp_path / "out", model=pretrained, predictions=tmp_path / "folder.csv")
    error = mistake(capsys, "finetune", *words)
    assert error.startswith(f"{tmp_path / 'folder.csv'} can't be written")
    assert not (tmp_path / "out").exists()


def test_a_model_is_scored_on_the_images_that_its_run_was_scored_on(pretrained, tmp_path, capsys):
    colours = [(40, 40, 40), (200, 200, 200)] * 6
    first, other = (folder_of_images(tmp_path / name, [0, 1] * 6, colours) for name in ("first", "other"))
    out = tune(tmp_path / "out", model=pretrained, dataset=first, eval_dataset=other, max_samples=None)
    for name in (first, f"{first}/"):
        assert start("evaluate", "classification", "--model", out, "--dataset", name, "--num_workers", 0) == 0
        entry = json.loads((Path(out) / "results.json").read_text())[-1]
        assert entry["data"]["evaluated_on"] == f"split train of {other}"
        assert entry["data"]["eval_images"] == 12


def test_a_finished_run_says_so_without_a_count_of_bad_samples(pretrained, tmp_path, capsys):
    data = {"dataset": "d", "evaluated_on": "test", "eval_images": 5, "classes": 2}
    entry = {"protocol": {"name": "fine-tuning"}, "data": data, "checkpoint": {}, "figures": {"top1": 50.0}}
    add_result(tmp_path / "out" / "results.json", entry)
    assert start("finetune", *arguments(tmp_path / "out", model=pretrained, resume="auto")) == 0
    assert capsys.readouterr().out.startswith("evaluated on 5 images\n  top1  50.00 %\nmodel ")


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


def test_a_step_takes_a_smaller_training_set_once(pretrained, tmp_path, caplog):
    keys = {"max_samples": 20, "total_batch_size": 64, "total_steps": None, "epochs": 10}
    out = tune(tmp_path / "out", model=pretrained, **keys)
    effect = "a step uses each image once, and the run is 3 epochs; pass --total_batch_size 20 or less"
    assert caplog.messages == [
        "1 of 10 classes have no training images: 4",
        f"a step of 64 images is larger than the training set of 20: {effect}",
    ]
    assert results(out)["protocol"]["epochs"] == 3
    steps = [event for event in events(out) if "loss" in event]
    assert [(event["epoch"], event["images_seen"]) for event in steps] == [(1, 20), (2, 40), (3, 60)]


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
    # A configuration belongs to --dataset, so it isn't named with another set.
    words += ["--dataset_config", "default", "--eval_dataset", data, "--eval_split", "validation"]
    assert start("evaluate", "classification", *words) == 0
    again = json.loads((Path(out) / "results.json").read_text())[-1]["data"]
    assert (again["dataset"], again["config"], again["revision"]) == (data, None, None)


def test_numbers_of_an_image(colourful, tmp_path, capsys):
    values = np.random.default_rng(3).uniform(0, 1, 90).round(3).tolist()
    data = folder_of_images(tmp_path / "data", values, [(int(40 + 160 * v),) * 3 for v in values], "brightness")
    out = tune(tmp_path / "out", **FAST, model=colourful, dataset=data, label_column="brightness",
               problem_type="regression")  # fmt: skip
    figures = results(out)["figures"]
    assert figures["mae"] < 0.12  # the mean alone would be off by 0.25
    printed = capsys.readouterr().out
    assert "1 numbers per image" in printed
    use = printed.splitlines()[-1].removeprefix("use it   ")
    assert "pipeline" not in use
    names = {"image": Image.new("RGB", (12, 9), (100,) * 3)}
    exec(use.replace("; model(", "; numbers = model("), names)
    assert names["numbers"].shape == (1, 1)
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
    assert "1 images can't be decoded and are not scored; the first is bee/1.png" in printed
    assert f"2 images could not be decoded: {out}/bad_samples.jsonl" in printed
    bad = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert bad == [
        {"key": "ant/2.png", "reason": "UnidentifiedImageError"},
        {"key": "bee/1.png", "reason": "EmptyFile"},
    ]
    assert results(out)["data"]["eval_images"] == 79
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "ant", "1": "bee"}


def test_a_rare_class_is_held_out_and_scored_by_finetune_and_evaluate_alike(colourful, tmp_path, monkeypatch, capsys):
    data = Path(class_folders(tmp_path / "data"))
    for number in range(6, 40):
        (data / "bee" / f"{number}.png").unlink()
    scored = []

    def spy(*args, **keys):
        scored.append(open_splits(*args, **keys)[1].index.tolist())
        return open_splits(*args, **keys)

    for module in ("training.finetune", "evaluation.classification"):
        monkeypatch.setattr(f"hf_mae.{module}.open_splits", spy)
    keys = {"total_batch_size": 8, "total_steps": 2, "class_weights": "balanced"}
    out = tune(tmp_path / "out", model=colourful, dataset=data, eval_fraction=0.3, **keys)
    words = ["evaluate", "classification", "--model", out, "--num_workers", 0, "--dataset"]
    assert start(*words, data) == 0  # the run's fraction, as the data is the run's
    assert start(*words, data, "--eval_fraction", 0.3) == 0
    assert scored[0] == scored[1] == scored[2]
    assert sum(number >= 40 for number in scored[0]) == 2  # bees
    assert len(scored[0]) == 14
    tuned, again = read_results(out / "results.json")  # the third equals the second and takes its place
    assert tuned["data"]["evaluated_on"] == "30% of each class of train, held out by a hash of each row's place"
    assert again["data"]["evaluated_on"] == tuned["data"]["evaluated_on"]
    assert again["figures"] == pytest.approx({name: tuned["figures"][name] for name in again["figures"]})
    # Other data, and another fraction, are the user's choice.
    other = shutil.copytree(data, tmp_path / "other")
    assert start(*words, other) == 0
    assert start(*words, data, "--eval_fraction", 0.5) == 0
    assert [len(rows) for rows in scored[3:]] == [3, 23]
    message = mistake(capsys, "finetune", *arguments(out, model=colourful, dataset=data, resume="auto", **keys))
    assert "belongs to a run with eval_fraction 0.3, not None; use the same recipe" in message


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": None}, "--model is missing: folder or Hub id of a pretrained or fine-tuned model"),
        ({"model": "there/is/none"}, "--model there/is/none can't be loaded"),
        ({"trainable_blocks": 3}, "trainable_blocks 3 is not possible; choose 0, 0.5, 1 to 2, or all"),
        ({"trainable_blocks": "most"}, "trainable_blocks most is not possible"),
        ({"recipe": "quickstart"}, "unknown recipe 'quickstart'; did you mean 'finetune_quickstart'?"),
        ({"mixup": 0.8, "problem_type": "regression"}, "problem_type is regression; pass --mixup 0"),
        ({"problem_type": "multi_label_classification"}, "pass --problem_type single_label_classification"),
        ({"layer_decay": 1.5}, "layer_decay 1.5 is out of range; give a number in [0, 1]"),
        ({"blr": 0}, "blr 0.0 is not positive"),
        ({"eval_fraction": 1}, "eval_fraction 1.0 lies outside (0, 1); give e.g. 0.2"),
        ({"class_weights": "balanced", "problem_type": "regression"}, "regression; pass --class_weights none"),
        ({"image_size": 7}, "image_size 7x7 is not a multiple of patch_size 2x2; the nearest that fits is"),
        ({"total_batch_size": 30, "per_device_batch_size": 16}, "is not a multiple of per_device_batch_size 16"),
        ({"eval_split": "test"}, "digits has no split 'test'; choose one of: train"),
        ({"layer_decy": 0.5}, "unknown argument '--layer_decy'; did you mean '--layer_decay'?"),
        ({"rand_augment": "strong"}, "rand_augment strong is unknown to timm"),
        ({"resume": "there/is/none"}, "there/is/none is not a complete checkpoint (with trainer_state.json); name an"),
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
    assert "is not a list of results of hf-mae; move it away" in mistake(
        capsys, "finetune", *arguments(out, model=pretrained)
    )
    assert [path.name for path in out.iterdir()] == ["results.json"]


def test_other_results_in_the_folder_are_not_taken_for_those_of_the_run(pretrained, tmp_path):
    other = {"protocol": {"name": "knn"}, "data": {}, "checkpoint": {}, "figures": {"knn_top1": 50.0}}
    add_result(tmp_path / "out" / "results.json", other)
    out = tune(tmp_path / "out", model=pretrained, resume="auto", total_steps=1)
    assert [entry["protocol"]["name"] for entry in read_results(out / "results.json")] == ["knn", "fine-tuning"]


def test_data_that_does_not_fit_gets_one_line_with_the_remedy(colourful, pretrained, tmp_path, capsys):
    cases = [
        (class_folders(tmp_path / "one", ["ant"]), "have no label; sort images into one folder per class"),
        (folder_of_images(tmp_path / "same", [4] * 9, [(9, 9, 9)] * 9), "has only one class (4); two or more are need"),
    ]
    for data, message in cases:
        words = arguments(tmp_path / "out", model=colourful, dataset=data)
        assert message in mistake(capsys, "finetune", *words)
    data = class_folders(tmp_path / "two")
    out = tune(tmp_path / "tuned", model=colourful, dataset=data, total_batch_size=4, total_steps=1)
    other = class_folders(tmp_path / "other", ["cow", "bee", "emu"])
    error = mistake(capsys, "finetune", *arguments(tmp_path / "out", model=out, dataset=other))
    assert (
        f"{out} has the classes ant, bee, but {other} has bee, cow, emu; pass --reset_head true for a new head" in error
    )
    error = mistake(capsys, "evaluate", "classification", "--model", out, "--dataset", other, "--eval_split", "train")
    assert "has the label cow, which is not one of the model's 2 classes (ant, bee)" in error
    error = mistake(capsys, "evaluate", "classification", "--model", colourful, "--dataset", data)
    assert f"{colourful} has no classifier; train one with hf-mae finetune --model {colourful}" in error
    bands = tmp_path / "bands"
    for i in range(4):
        (bands / "xy"[i % 2]).mkdir(parents=True, exist_ok=True)
        np.save(bands / "xy"[i % 2] / f"{i}.npy", np.zeros((5, 8, 8), dtype=np.uint8))
    error = mistake(
        capsys, "finetune", *arguments(tmp_path / "out", model=colourful, dataset=bands, eval_dataset=bands)
    )
    assert "have 5 channels, but the model has 3; continue its pretraining on such images" in error
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_kind_is_no_mae(pretrained, tmp_path, capsys):
    folder = tmp_path / "vit"
    shutil.copytree(pretrained, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(folder / "model.safetensors")
    from safetensors.torch import save_file

    save_file({name: weights[name] for name in list(weights)[:8]}, folder / "model.safetensors", {"format": "pt"})
    error = mistake(capsys, "finetune", *arguments(tmp_path / "out", model=folder))
    assert "of the encoder's weights, such as mae." in error


def test_without_timm_the_error_names_the_extra(pretrained, tmp_path, capsys, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    words = arguments(tmp_path / "out", model=pretrained, rand_augment="rand-m9-mstd0.5-inc1")
    assert "hf-mae finetune needs the package timm: pip install 'hf-mae[train]'" in mistake(capsys, "finetune", *words)


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


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
@pytest.mark.parametrize("name", recipe_names("finetune"))
def test_every_recipe_turns_off_mixing_of_classes_where_an_image_has_not_one_class(name, problem, caplog):
    words = ["--recipe", name, "--model", "m", "--problem_type", problem]
    recipe = load_finetune_recipe(words)
    assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing) == (0, 0, 0)
    (line,) = caplog.messages
    assert re.fullmatch(rf"recipe {name}: [a-z, ]*label_smoothing set to 0, because .* problem_type is {problem}", line)
    message = f"^label_smoothing needs one class per image, but problem_type is {problem}; pass --label_smoothing 0"
    with pytest.raises(UserError, match=message):
        load_finetune_recipe([*words, "--label_smoothing", "0.1"])


def test_a_recipe_for_one_class_an_image_keeps_its_mixing(caplog):
    recipe = load_finetune_recipe(["--recipe", "finetune_vit_base_in1k", "--model", "m", "--mixup", "0.5"])
    assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing) == (0.5, 1.0, 0.1)
    assert caplog.messages == []
