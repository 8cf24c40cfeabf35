"""Figures of classifiers: `evaluate.Metric` classes that need no download, and Trainer's `compute_metrics`."""

# Shape letters in this file
#   n images   K classes   R resamples of a bootstrap

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, List, Value
from transformers import EvalPrediction

from ..data.labels import Labels
from .intervals import accuracy_interval, bootstrap, ranking
from .table import top_k_correct, top_ks

RANKED = ("map", "auroc")  # figures of multi-label classification


class TopK(evaluate.Metric):
    """Share of images whose label is among the k classes with the highest scores; base of `Top1` and `Top5`.

    `compute(predictions=..., references=...)` takes (n, K) scores such as logits, or (n,) class numbers if k is 1,
    with (n,) labels. It returns `top1` (or `top5`) in percent. Works in `evaluate.combine([Top1(), Top5()])` and, with
    class numbers, as `metric=` of `evaluate.evaluator("image-classification")`.
    """

    k: int

    def _info(self) -> evaluate.MetricInfo:
        labels = Value("int64")
        kinds = [Features({"predictions": List(Value("float32")), "references": labels})]
        if self.k == 1:
            kinds.append(Features({"predictions": Value("int64"), "references": labels}))
        return evaluate.MetricInfo(
            description=f"Share of labels among the {self.k} classes with the highest scores, in percent.",
            citation="",
            inputs_description="predictions: (n, K) scores, for top-1 also (n,) class numbers; references: (n,) labels",
            features=kinds,
        )

    def _compute(self, *, predictions: Sequence[Any], references: Sequence[int]) -> dict[str, float]:  # type: ignore[override]
        scores = np.asarray(predictions)
        if scores.ndim == 1:
            return {"top1": 100 * float((scores == np.asarray(references)).mean())}
        return {f"top{self.k}": top_k_percent(scores, np.asarray(references), self.k)}


class Top1(TopK):
    """Top-1 accuracy, in [0, 100] percent: `Top1().compute(predictions=..., references=...)["top1"]`.

    Predictions are (n, K) scores or (n,) class numbers, references (n,) class numbers.
    """

    k = 1


class Top5(TopK):
    """Top-5 accuracy, in [0, 100] percent: `Top5().compute(predictions=..., references=...)["top5"]`.

    Predictions are (n, K) scores, references (n,) class numbers. With fewer than 5 classes, it is 100.
    """

    k = 5


def top_k_percent(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Percentage of rows of (n, K) scores whose label (n,) is among the k highest; 100 if k >= K."""
    return 100 * top_k_correct(torch.from_numpy(scores), torch.from_numpy(labels), k) / len(labels)


def make_compute_metrics(problem_type: str | None) -> Callable[[EvalPrediction], dict[str, float]]:
    """Make `compute_metrics` for a Trainer, by the `problem_type` of the model's config.

    Args:
        problem_type: "single_label_classification" or None: `top1` and, with more than five classes, `top5`, in
            percent.
            "multi_label_classification": `map` (mean over the classes of the average precision) and `auroc` (mean over
            the classes of the area under the ROC curve), both in [0, 1]. A class that no image has, or for `auroc` that
            all images have, is left out; if no class remains, the figure is nan.
            "regression": `mae`, the mean absolute error, in the labels' unit.

    Returns:
        A function of the Trainer's predictions (n, K) and labels, (n,) or (n, K), that gives these figures by name.

    Raises:
        ValueError: for another problem type.
    """
    kinds = {
        "single_label_classification": _single_label,
        "multi_label_classification": _multi_label,
        "regression": _regression,
    }
    if problem_type is not None and problem_type not in kinds:
        raise ValueError(f"problem_type {problem_type!r} is unknown; use one of {', '.join(kinds)}")
    measure = kinds[problem_type or "single_label_classification"]

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return measure(*arrays_of(prediction))

    return compute_metrics


def arrays_of(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """A Trainer's scores, (n, K) float32, and labels, (n,) or (n, K)."""
    scores: Any = prediction.predictions
    # A model that also returns hidden states gives a tuple, logits first.
    scores = np.asarray(scores[0] if isinstance(scores, tuple) else scores, dtype=np.float32)
    return scores, np.asarray(prediction.label_ids)


def _single_label(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {f"top{k}": top_k_percent(scores, labels, k) for k in top_ks(scores.shape[1])}


def _multi_label(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores (n, K) and labels (n, K) of 0 and 1."""
    ranked = _rank_classes(scores, labels, np.ones((len(labels), 1), np.int32))
    return dict(zip(RANKED, _mean(ranked)[0].tolist(), strict=True))


def _regression(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"mae": float(_errors(scores, labels).mean())}


def _errors(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Absolute errors of scores (n, ...) and labels of the same size, but any shape: (n, 1) and (n,) match."""
    return np.abs(scores.reshape(labels.shape) - labels)


def _rank_classes(scores: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average precision and AUROC of each class in each resample, (R, K, 2); see `ranking`."""
    return np.stack([ranking(scores[:, c], labels[:, c], counts) for c in range(labels.shape[1])], axis=1)


def _mean(figures: np.ndarray) -> np.ndarray:
    """The mean of (..., K, 2) figures over those classes that have them, (..., 2); NaN if none has."""
    known = ~np.isnan(figures)
    with np.errstate(invalid="ignore"):
        return np.where(known, figures, 0.0).sum(axis=-2) / known.sum(axis=-2)


# ------------------------------------------------------------------------------------------ in detail


@dataclass
class Details:
    """What an entry of results.json says besides its figures.

    Attributes:
        intervals: figure -> lower and upper limit; accuracies, which need only their value, are left out.
        per_class: class name -> `support`, the number of its images; `figures`, `accuracy` in percent or `ap` and
            `auroc`; and their `intervals`. Figures that a class doesn't have are left out.
    """

    intervals: dict[str, list[float]]
    per_class: dict[str, dict[str, Any]] | None = None


def detail(labels: Labels, scores: np.ndarray, targets: np.ndarray) -> Details:
    """Intervals and figures of each class, from scores (n, K) and the targets that `labels` makes."""
    if labels.problem == "regression":
        errors = _errors(scores, targets).reshape(len(targets), -1).mean(axis=1)
        limits = bootstrap(lambda counts: errors @ counts / len(errors), len(errors))
        return Details({"mae": limits.tolist()})
    if labels.problem == "single_label_classification":
        hits = scores.argmax(axis=1) == targets
        parts = [hits[targets == c] for c in range(len(labels.names))]
        return Details({}, {name: _class_accuracy(part) for name, part in zip(labels.names, parts, strict=True)})

    def measure(counts: np.ndarray) -> np.ndarray:
        ranked = _rank_classes(scores, targets, counts)
        return np.concatenate([ranked, _mean(ranked)[:, None]], axis=1)  # (R, K + 1, 2)

    (figures,) = measure(np.ones((len(targets), 1), np.int32))
    limits = np.moveaxis(bootstrap(measure, len(targets)), 0, -1)
    support = targets.sum(axis=0).astype(int).tolist()
    per_class = [
        {"support": number, **_defined(("ap", "auroc"), figures[c], limits[c])} for c, number in enumerate(support)
    ]
    return Details(
        _defined(RANKED, figures[-1], limits[-1])["intervals"], dict(zip(labels.names, per_class, strict=True))
    )


def _class_accuracy(hits: np.ndarray) -> dict[str, Any]:
    """The table of a class whose images are hit or missed, (support,) bool."""
    if not len(hits):
        return {"support": 0, "figures": {}, "intervals": {}}
    accuracy = 100 * float(hits.mean())
    intervals = {"accuracy": accuracy_interval(accuracy, len(hits))}
    return {"support": len(hits), "figures": {"accuracy": accuracy}, "intervals": intervals}


def _defined(names: Sequence[str], figures: np.ndarray, limits: np.ndarray) -> dict[str, dict[str, Any]]:
    """Figures (m,) and their limits (m, 2) by name, without those that are NaN."""
    known = [(name, i) for i, name in enumerate(names) if not np.isnan(figures[i])]
    return {
        "figures": {name: float(figures[i]) for name, i in known},
        "intervals": {name: limits[i].tolist() for name, i in known},
    }
