"""Figures of merit, against scikit-learn and by hand; `evaluate` and Trainer with them, without any network."""

import socket

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, mean_absolute_error, roc_auc_score, top_k_accuracy_score
from tiny import pixels, tiny
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_mae import MAEForImageClassification, MAEImageProcessor
from hf_mae.data.labels import Labels

evaluate = pytest.importorskip("evaluate")
metrics = pytest.importorskip("hf_mae.evaluation.metrics")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """A connection to anywhere is an error; `evaluate` writes what it collects into a folder of the test."""

    def refuse(*args):
        raise AssertionError(f"connects to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def scores_and_labels(n=200, classes=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, classes)).astype(np.float32), rng.integers(0, classes, n)


def test_top_1_and_top_5_by_hand():
    scores = np.array([[9, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9], [1, 2, 3, 9, 5, 6]], np.float32)
    labels = np.array([0, 0, 5])  # first; sixth; second
    assert metrics.top_k_percent(scores, labels, 1) == pytest.approx(100 / 3)
    assert metrics.top_k_percent(scores, labels, 2) == pytest.approx(200 / 3)
    assert metrics.top_k_percent(scores, labels, 5) == pytest.approx(200 / 3)
    assert metrics.top_k_percent(scores, labels, 6) == 100
    assert metrics.top_k_percent(scores, labels, 7) == 100  # fewer classes than k


def test_combined_metrics_are_scikit_learns_without_a_connection():
    scores, labels = scores_and_labels()
    found = evaluate.combine([metrics.Top1(), metrics.Top5()]).compute(predictions=scores, references=labels)
    expected = {
        f"top{k}": 100 * top_k_accuracy_score(labels, scores, k=k, labels=range(scores.shape[1])) for k in (1, 5)
    }
    assert found == pytest.approx(expected)
    assert 0 < found["top1"] < found["top5"] < 100


def test_metrics_collect_batch_by_batch():
    scores, labels = scores_and_labels()
    metric = metrics.Top5()
    for start in range(0, 200, 64):
        metric.add_batch(predictions=scores[start : start + 64], references=labels[start : start + 64])
    assert metric.compute() == pytest.approx({"top5": metrics.top_k_percent(scores, labels, 5)})


def test_top_1_takes_class_numbers_and_top_5_says_that_it_needs_scores():
    assert metrics.Top1().compute(predictions=[0, 1, 2, 1], references=[0, 1, 1, 1]) == {"top1": 75.0}
    with pytest.raises(ValueError, match="float32"):
        metrics.Top5().compute(predictions=[0, 1], references=[0, 1])


def classifier(**overrides):
    return tiny(MAEForImageClassification, num_labels=6, **overrides)


def dataset(model, n=20):
    images = pixels(n)
    with torch.no_grad():
        guesses = model(images).logits.argsort(dim=1, descending=True)
    # Of four images each, the label is the first, second, ... fifth guess.
    labels = guesses[torch.arange(n), torch.arange(n) % 5]
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]


def test_a_trainer_reports_them(tmp_path):
    model = classifier()
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=7)
    trainer = Trainer(model, arguments, eval_dataset=dataset(model), compute_metrics=metrics.make_compute_metrics(None))
    found = trainer.evaluate()
    assert found["eval_top1"] == pytest.approx(20)
    assert found["eval_top5"] == pytest.approx(100)


def test_the_evaluator_takes_top_1():
    datasets = pytest.importorskip("datasets")
    model = classifier()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(10)]
    processor = MAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        guesses = model(**processor(images, return_tensors="pt")).logits.argsort(dim=1, descending=True)
    labels = guesses[torch.arange(10), (torch.arange(10) >= 7).long()].tolist()  # three are wrong
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    found = evaluate.evaluator("image-classification").compute(
        model, data, metric=metrics.Top1(), label_mapping=model.config.label2id, feature_extractor=processor
    )
    assert found["top1"] == pytest.approx(70)


def test_multi_label_figures_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (50, 4))
    scores = (labels + rng.normal(size=labels.shape)).astype(np.float32)
    found = metrics.make_compute_metrics("multi_label_classification")(EvalPrediction(scores, labels))
    assert found == pytest.approx(
        {
            "map": average_precision_score(labels, scores, average="macro"),
            "auroc": roc_auc_score(labels, scores, average="macro"),
        }
    )
    assert 0.5 < found["map"] < 1


def test_classes_that_no_image_or_every_image_has_are_left_out_of_the_means():
    # By hand: class 0: positives ranked first and third, precision (1/1 + 2/3) / 2, of 2 x 1 pairs one is in order.
    scores = np.array([[3, 0, 1], [2, 0, 2], [1, 0, 3]], np.float32)
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]])
    found = metrics.make_compute_metrics("multi_label_classification")(EvalPrediction(scores, labels))
    assert found == pytest.approx({"map": (5 / 6 + 1) / 2, "auroc": 1 / 2})
    nothing = metrics.make_compute_metrics("multi_label_classification")(EvalPrediction(scores, 0 * labels))
    assert np.isnan(nothing["map"])
    assert np.isnan(nothing["auroc"])


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3)])
def test_mean_absolute_error_is_scikit_learns_whatever_the_shape(shape):
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=shape).astype(np.float32), rng.normal(size=shape).astype(np.float32)
    logits = scores.reshape(5, -1)  # as a classification head gives them
    found = metrics.make_compute_metrics("regression")(EvalPrediction(logits, labels))
    assert found == {"mae": pytest.approx(mean_absolute_error(labels, scores))}


def test_logits_are_found_in_front_of_hidden_states():
    scores, labels = scores_and_labels()
    with_states = EvalPrediction((scores, np.zeros((200, 3))), labels)
    measure = metrics.make_compute_metrics("single_label_classification")
    assert measure(with_states) == measure(EvalPrediction(scores, labels))


def test_an_unknown_problem_type_is_named():
    with pytest.raises(ValueError, match="'ranking' is unknown; use one of single_label"):
        metrics.make_compute_metrics("ranking")


def test_top_5_is_left_out_where_all_classes_are_among_the_first_five():
    measure = metrics.make_compute_metrics(None)
    assert measure(EvalPrediction(*scores_and_labels(classes=5))).keys() == {"top1"}
    assert measure(EvalPrediction(*scores_and_labels(classes=6))).keys() == {"top1", "top5"}


def test_the_accuracy_of_each_class_is_its_share_of_hits():
    scores = np.array([[2, 1, 0], [2, 1, 0], [0, 1, 2], [0, 3, 2]], np.float32)
    labels = Labels("single_label_classification", ("cat", "dog", "owl"))
    found = metrics.detail(labels, scores, np.array([0, 0, 0, 1]))
    cat, dog, owl = (found.per_class[name] for name in labels.names)
    assert cat == {"support": 3, "figures": {"accuracy": pytest.approx(200 / 3)}, "intervals": {"accuracy": [0, 100]}}
    assert dog == {"support": 1, "figures": {"accuracy": 100}, "intervals": {"accuracy": [100, 100]}}
    assert owl == {"support": 0, "figures": {}, "intervals": {}}
    assert found.intervals == {}


def test_multi_label_details_are_those_of_every_resample_measured_anew():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (30, 3))
    targets[:, 2] = 0
    scores = (targets + rng.normal(size=targets.shape)).astype(np.float32)
    found = metrics.detail(Labels("multi_label_classification", ("a", "b", "c")), scores, targets)
    rng = np.random.default_rng(0)  # the draws of `bootstrap`
    drawn = [np.sort(rng.integers(30, size=30)) for _ in range(1000)]
    each = [
        [measure(targets[rows, c], scores[rows, c]) for rows in drawn if 0 < targets[rows, c].sum() < 30]
        for c in (0, 1)
        for measure in (average_precision_score, roc_auc_score)
    ]
    for name, c in (("a", 0), ("b", 1)):
        table = found.per_class[name]
        assert table["support"] == targets[:, c].sum()
        assert table["figures"] == pytest.approx(
            {
                "ap": average_precision_score(targets[:, c], scores[:, c]),
                "auroc": roc_auc_score(targets[:, c], scores[:, c]),
            }
        )
        for i, figure in enumerate(("ap", "auroc")):
            assert table["intervals"][figure] == pytest.approx(np.percentile(each[2 * c + i], [2.5, 97.5]))
    assert found.per_class["c"] == {"support": 0, "figures": {}, "intervals": {}}
    for i, figure in enumerate(("map", "auroc")):
        means = np.mean([each[i], each[2 + i]], axis=0)
        assert found.intervals[figure] == pytest.approx(np.percentile(means, [2.5, 97.5]))


def test_the_interval_of_a_mean_error_holds_the_error():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(80, 2)).astype(np.float32), rng.normal(size=(80, 2)).astype(np.float32)
    found = metrics.detail(Labels("regression", ("x", "y")), scores, targets)
    assert found.per_class is None
    low, high = found.intervals["mae"]
    error = mean_absolute_error(targets, scores)
    spread = np.abs(targets - scores).mean(axis=1).std() / np.sqrt(80)
    assert (low, high) == pytest.approx((error - 1.96 * spread, error + 1.96 * spread), rel=0.03)
