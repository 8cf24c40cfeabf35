"""`hf-mae evaluate` on frozen features: results.json, and mistakes in one line."""

import hashlib
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import runs
import torch
from features import table_of
from PIL import Image
from runs import start
from tiny import save_model

from hf_mae import MAEConfig, MAEForPreTraining, MAEImageProcessor
from hf_mae.data.sources import open_splits
from hf_mae.errors import UserError
from hf_mae.evaluation.encoder import FrozenEncoder
from hf_mae.evaluation.fast_linear import fast_linear_accuracy
from hf_mae.evaluation.knn import knn_accuracy
from hf_mae.evaluation.table import Features
from hf_mae.hub.card import Card
from hf_mae.keys.data_keys import SplitKeys
from hf_mae.run_folder import add_result, read_results


@pytest.fixture
def mistake(capfd):
    return partial(runs.mistake, capfd)


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model")


def command(protocol, folder, *words):
    few = ["--num_workers", 0, "--max_samples", 120, "--max_eval_samples", 40]
    return ["evaluate", protocol, "--model", folder, "--dataset", "digits", *few, *words]


def test_results_of_several_evaluations_stand_side_by_side_in_the_models_folder(folder, capsys, tmp_path):
    assert start(*command("knn", folder, "--k", 1, 5)) == 0
    printed = capsys.readouterr().out
    assert start(*command("linear-probe", folder)) == 0
    assert start(*command("knn", folder, "--k", 5, 1, "--pooling", "cls")) == 0
    path = tmp_path / "model" / "results.json"
    results = json.loads(path.read_text())
    assert [(r["protocol"]["name"], r["protocol"]["pooling"]) for r in results] == [
        ("knn", "mean"), ("linear_probe_fast", "mean"), ("knn", "cls"),
    ]  # fmt: skip
    assert f"{results[0]['figures']['knn_top1_k5']:.2f} %" in printed
    assert printed.splitlines()[-1] == f"added to {path}"
    assert results[0]["data"] == {
        "dataset": "digits", "config": None, "revision": None, "split": "train",
        "evaluated_on": "5% of train, held out by a hash of each row's place", "max_samples": 120,
        "max_eval_samples": 40, "train_images": 120, "eval_images": 40, "classes": 10,
    }  # fmt: skip
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert results[0]["checkpoint"] == {"path": folder, "sha256": hashlib.sha256(weights).hexdigest()}
    assert {"hf_mae", "torch", "transformers"} <= results[0]["versions"].keys()
    # Once more: in place of the first.
    assert start(*command("knn", folder, "--k", 1, 5)) == 0
    again = json.loads(path.read_text())
    assert len(again) == 3
    assert again[-1] == results[0]


def test_the_commands_figures_are_those_of_the_functions(folder, tmp_path):
    out = tmp_path / "there" / "figures.json"
    assert start(*command("knn", folder, "--results", out, "--k", 1, 20, "--temperature", 0.1)) == 0
    assert start(*command("linear-probe", folder, "--results", out)) == 0
    assert not (tmp_path / "model" / "results.json").exists()
    rows, eval_rows, _ = open_splits(SplitKeys(dataset="digits", max_samples=120, max_eval_samples=40))
    encoder = FrozenEncoder(folder, "mean")
    train, test = (
        Features(table.values, torch.tensor(table.labels))
        for table in (table_of(encoder, part) for part in (rows, eval_rows))
    )
    knn, linear = read_results(out)
    assert knn["figures"] == pytest.approx(knn_accuracy(train, test, (1, 20), 0.1))
    assert linear["figures"] == pytest.approx(fast_linear_accuracy(train, test))
    assert "ranges" not in knn


def test_repetitions_give_a_mean_and_a_range(folder, tmp_path):
    out = tmp_path / "figures.json"
    assert start(*command("knn", folder, "--results", out, "--k", 1, "--seeds", 3, "--fraction", 0.5)) == 0
    (result,) = read_results(out)
    low, high = result["ranges"]["knn_top1_k1"]
    assert low < result["figures"]["knn_top1_k1"] < high
    assert (result["protocol"]["seeds"], result["protocol"]["fraction"]) == (3, 0.5)


def test_figures_have_intervals_and_a_k_above_the_bank_is_marked(folder, capsys):
    assert start(*command("knn", folder, "--k", 20, 200, "--results", "none")) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    interval = r"\d+\.\d\d % \(95 % interval \d+\.\d\d to \d+\.\d\d\)"
    assert re.fullmatch(rf"  knn_top1_k20 +{interval}", lines[2])
    assert re.fullmatch(
        rf"  knn_top1_k200 +{interval} \(k is larger than the training set, so all 120 images vote\)", lines[3]
    )
    assert (
        start(
            *command("knn", folder, "--k", 20, "--eval_split", "train", "--max_eval_samples", 100, "--results", "none")
        )
        == 0
    )
    assert re.search(rf"  knn_top1_k20 +{interval}$", capsys.readouterr().out, re.MULTILINE)


def test_no_results_are_written_where_none_are_wanted(folder, tmp_path, capsys):
    assert start(*command("knn", folder, "--results", "none")) == 0
    assert "not saved; pass --results FILE" in capsys.readouterr().out
    assert not (tmp_path / "model" / "results.json").exists()


def test_a_file_that_holds_something_else_is_not_overwritten(folder, tmp_path, mistake):
    other = tmp_path / "notes.json"
    for text in ("precious", '{"a": 1}', "[1, 2]"):
        other.write_text(text)
        assert "is not a list of results" in mistake(*command("knn", folder, "--results", other))
        assert other.read_text() == text
    with pytest.raises(UserError, match="can't be written"):
        add_result(other / "below", {"protocol": 1, "data": 2, "checkpoint": 3, "figures": {}})


def class_folder(path, classes, count=3):
    rng = np.random.default_rng(0)
    for name in classes:
        (path / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (9, 9), np.uint8)).save(path / name / f"{number}.png")
    return path


def test_results_name_the_table_of_labels_and_cards_its_last_name(folder, tmp_path):
    class_folder(tmp_path / "images", [""], count=9)
    lines = [f"{number}.png,{'ab'[number % 2]}" for number in range(9)]
    table = tmp_path / "findings.csv"
    table.write_text("\n".join(["file,finding", *lines]))
    data = ["--dataset", tmp_path / "images", "--eval_dataset", tmp_path / "images", "--labels", table]
    assert start("evaluate", "knn", "--model", folder, *data, "--num_workers", 0) == 0
    (result,) = read_results(tmp_path / "model" / "results.json")
    assert result["data"]["labels"] == str(table)
    assert "labels from findings.csv." in (text := Card(folder).text())
    assert str(tmp_path) not in text


MISTAKES = {
    "no such model": (["--model", "./nothing"], ["--model ./nothing can't be loaded"]),
    "no such split": (["--eval_split", "nothing"], ["'nothing'", "choose one of: train"]),
    "no neighbours": (["--k", "0"], ["k [0]"]),
    "cold": (["--temperature", "0"], ["temperature 0"]),
    "no images": (["--max_samples", "0"], ["max_samples 0 is too small"]),
    "no repetitions": (["--seeds", "0"], ["seeds 0 is too small"]),
    "too large a share": (["--fraction", "1.5"], ["fraction 1.5 lies outside (0, 1]"]),
    "a misspelt key": (["--temprature", "1"], ["unknown argument '--temprature'; did you mean '--temperature'?"]),
    "one image": (["--max_samples", "1"], ["1 images of split train of digits have only one class"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_can_not_be_evaluated_gets_one_line(case, folder, mistake):
    words, expected = MISTAKES[case]
    message = mistake(*command("knn", folder, *words))
    for words in expected:
        assert words in message


def test_folders_that_will_not_do_get_one_line(folder, tmp_path, mistake):
    def message(train, test):
        return mistake(
            "evaluate", "knn", "--model", folder, "--dataset", train, "--eval_dataset", test, "--num_workers", 0
        )

    animals = class_folder(tmp_path / "animals", ["cat", "dog"])
    others = class_folder(tmp_path / "others", ["cat", "eel"])
    flat = class_folder(tmp_path / "flat", [""])
    assert "1 of 2 classes of split train of" in message(animals, others)
    assert "have no label; sort images into one folder per class, name the column with --label_column" in message(
        animals, flat
    )
    assert "have no label" in message(flat, animals)
    (animals / "cat" / "1.png").write_bytes(b"broken")
    assert "1 of the 6 images" in (found := message(animals, animals))
    assert "UnidentifiedImageError 1; the first is cat/1.png" in found
    assert "more than max_bad_fraction 1.0%" in found


def test_bad_images_up_to_the_allowed_share_are_told(folder, tmp_path, caplog):
    animals = class_folder(tmp_path / "animals", ["cat", "dog"])
    (animals / "cat" / "1.png").write_bytes(b"broken")
    out = tmp_path / "figures.json"
    words = ["--num_workers", 0, "--max_bad_fraction", 0.2, "--results", out]
    assert start("evaluate", "knn", "--model", folder, "--dataset", animals, "--eval_dataset", animals, *words) == 0
    (result,) = read_results(out)
    assert (result["data"]["train_images"], result["data"]["eval_images"]) == (5, 5)
    assert "1 of the 6 images" in caplog.text
    assert "cat/1.png" in caplog.text


def test_a_model_of_another_kind_is_not_taken_for_one_of_ours(tmp_path, mistake):
    from transformers import ViTConfig, ViTModel

    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ViTModel(ViTConfig(**sizes, intermediate_size=96)).save_pretrained(tmp_path / "vit")
    MAEImageProcessor().save_pretrained(tmp_path / "vit")
    assert "is a model of type vit, not mae; convert it: hf-mae convert" in mistake(*command("knn", tmp_path / "vit"))
    # Its weights under a configuration of ours.
    MAEConfig(**sizes, intermediate_size=96).save_pretrained(tmp_path / "vit")
    assert "not a model of hf_mae" in mistake(*command("knn", tmp_path / "vit"))


def test_features_that_are_not_finite_are_an_error(tmp_path, mistake):
    folder = save_model(tmp_path / "model")
    model = MAEForPreTraining.from_pretrained(folder)
    with torch.no_grad():
        model.mae.norm.weight[0] = math.nan
    model.save_pretrained(folder)
    assert "are not finite; its training has diverged" in mistake(*command("knn", folder))


@pytest.mark.parametrize("fraction", ["nan", "5", "-0.1"])
@pytest.mark.parametrize("command", ["evaluate knn", "embed --output features.npy"])
def test_a_fraction_of_bad_images_that_is_none_is_refused(command, fraction, capsys):
    words = [*command.split(), "--model", "m", "--dataset", "digits", f"--max_bad_fraction={fraction}"]
    assert start(*words) == 2
    assert "out of range; give a number in [0, 1]" in capsys.readouterr().err
