"""Predictions of a fine-tuned model as a table, for images with and without labels."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from runs import mistake, start
from tiny import tiny
from transformers import AutoModelForImageClassification

from hf_mae import MAEForImageClassification, MAEImageProcessor
from hf_mae.data.labels import Labels
from hf_mae.evaluation.predictions import predicted, scores_of, write_predictions

SINGLE, MULTI = "single_label_classification", "multi_label_classification"
KINDS = [(SINGLE, 7), (MULTI, 7), ("regression", 2)]


def make_images(folder, number=9):
    folder.mkdir()
    for i in range(number):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def make_model(folder, problem, classes):
    names = {i: f"class {i}" for i in range(classes)}
    model = tiny(MAEForImageClassification, problem_type=problem, id2label=names)
    torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    MAEImageProcessor(**size).save_pretrained(folder)
    return folder


def expected_scores(model, images):
    """Scores of each image by transformers' classes alone."""
    model, processor = AutoModelForImageClassification.from_pretrained(model), MAEImageProcessor.from_pretrained(model)
    with torch.no_grad():
        logits = model(
            **processor([Image.open(path) for path in sorted(images.glob("*.png"))], return_tensors="pt")
        ).logits
    kind = model.config.problem_type
    return (logits.softmax(1) if kind == SINGLE else logits.sigmoid() if kind == MULTI else logits).numpy()


@pytest.mark.parametrize(("problem", "classes"), KINDS)
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_predict_writes_what_the_model_says_of_images_without_labels(tmp_path, problem, classes, ending, capsys):
    images, model = make_images(tmp_path / "images"), make_model(tmp_path / "model", problem, classes)
    file = tmp_path / "out" / f"said{ending}"
    assert start("predict", "--model", model, "--dataset", images, "--output", file, "--num_workers", 0) == 0
    assert "9 images" in capsys.readouterr().out
    rows = pq.read_table(file).to_pylist() if ending == ".parquet" else list(csv.DictReader(file.open()))
    names = [f"score_class {i}" for i in range(classes)]
    assert list(rows[0]) == ["key", *([] if problem == "regression" else ["prediction"]), *names]
    assert [row["key"] for row in rows] == [f"{i}.png" for i in range(9)]
    expected = expected_scores(model, images)
    assert np.array([[float(row[name]) for name in names] for row in rows]) == pytest.approx(expected, abs=1e-5)
    if problem == SINGLE:
        assert [row["prediction"] for row in rows] == [f"class {i}" for i in expected.argmax(1)]
    if problem == MULTI:
        texts = ["; ".join(f"class {i}" for i in range(classes) if row[i] > 0.5) for row in expected]
        assert [row["prediction"] for row in rows] == texts
        assert "; " in "".join(texts)


def test_a_table_has_the_labels_beside_the_predictions(tmp_path):
    labels = Labels(MULTI, ("a", "b"))
    scores, targets = np.array([[0.9, 0.1], [0.6, 0.7]], np.float32), np.array([[1, 1], [0, 0]])
    write_predictions(str(tmp_path / "x.csv"), "--predictions", labels, ["k1", "k2"], scores, targets)
    assert list(csv.reader((tmp_path / "x.csv").open())) == [
        ["key", "label", "prediction", "score_a", "score_b"],
        ["k1", "a; b", "a", "0.9", "0.1"],
        ["k2", "", "a; b", "0.6", "0.7"],
    ]
    numbers = Labels("regression", ("LABEL_0",))
    write_predictions(str(tmp_path / "x.csv"), "--predictions", numbers, ["k"], np.array([[1.5]]), np.array([[2.0]]))
    assert list(csv.reader((tmp_path / "x.csv").open())) == [["key", "label", "score_LABEL_0"], ["k", "2", "1.5"]]


def test_scores_are_probabilities_and_the_prediction_is_the_likeliest_class():
    labels = Labels(SINGLE, ("a", "b", "c"))
    scores = scores_of(labels, torch.tensor([[0.0, np.log(3), 0.0]]))
    assert scores == pytest.approx(np.array([[0.2, 0.6, 0.2]]))
    assert predicted(labels, scores) == [["b"]]


def test_evaluating_writes_the_predictions_that_its_figures_are_made_of(tmp_path, capsys):
    images, model = tmp_path / "images", make_model(tmp_path / "model", SINGLE, 7)
    images.mkdir()
    for name in ("class 2", "class 4"):
        make_images(images / name)
    file = tmp_path / "said.csv"
    words = ("--model", model, "--dataset", tmp_path / "other", "--eval_dataset", images, "--num_workers", 0)
    make_images(tmp_path / "other", 2)
    assert start("evaluate", "classification", *words, "--predictions", file) == 0
    printed, rows = capsys.readouterr().out, list(csv.DictReader(file.open()))
    assert [row["label"] for row in rows] == ["class 2"] * 9 + ["class 4"] * 9
    (entry,) = json.loads((model / "results.json").read_text())
    correct = [row["label"] == row["prediction"] for row in rows]
    assert entry["figures"]["top1"] == pytest.approx(100 * np.mean(correct))
    for name, part in (("class 2", correct[:9]), ("class 4", correct[9:])):
        table = entry["per_class"][name]
        assert table["support"] == 9
        assert table["figures"] == {"accuracy": pytest.approx(100 * np.mean(part))}
        assert f"  {name}  9 images, accuracy {100 * np.mean(part):.2f} %" in printed
    assert entry["per_class"]["class 0"] == {"support": 0, "figures": {}, "intervals": {}}


def test_images_of_all_splits_are_labelled_unless_one_is_named(tmp_path):
    model = make_model(tmp_path / "model", SINGLE, 7)
    for split in ("training", "testing"):
        (tmp_path / "data").mkdir(exist_ok=True)
        make_images(tmp_path / "data" / split, 2)
    words = ("predict", "--model", model, "--dataset", tmp_path / "data", "--num_workers", 0, "--output")
    for more, keys in (
        ([], ["training/0.png", "training/1.png", "testing/0.png", "testing/1.png"]),
        (["--split", "test"], ["testing/0.png", "testing/1.png"]),
    ):
        assert start(*words, tmp_path / "said.PARQUET", *more) == 0
        assert pq.read_table(tmp_path / "said.PARQUET").to_pydict()["key"] == keys


def test_a_file_of_another_kind_and_one_that_cannot_be_written_are_one_line(tmp_path, capsys):
    images, model = make_images(tmp_path / "images", 2), make_model(tmp_path / "model", SINGLE, 7)
    words = ("predict", "--model", model, "--dataset", images, "--num_workers", 0, "--output")
    error = mistake(capsys, *words, "said.txt")
    assert error == "output said.txt is not a .csv or .parquet file; change its ending"
    error = mistake(capsys, *words, model / "config.json" / "said.csv")
    assert "said.csv can't be written" in error
    assert error.endswith("name another --output, or make room")
    error = mistake(capsys, "evaluate", "classification", "--model", model, "--dataset", "digits", "--predictions", "a")
    assert error == "predictions a is not a .csv or .parquet file; change its ending"


def test_a_model_whose_outputs_are_not_finite_is_one_line(tmp_path, capsys):
    images, model = make_images(tmp_path / "images", 2), make_model(tmp_path / "model", SINGLE, 7)
    broken = AutoModelForImageClassification.from_pretrained(model)
    torch.nn.init.constant_(broken.classifier.bias, float("nan"))
    broken.save_pretrained(model)
    error = mistake(capsys, "predict", "--model", model, "--dataset", images, "--output", tmp_path / "x.csv")
    assert error.endswith("are not finite; its training has diverged")
