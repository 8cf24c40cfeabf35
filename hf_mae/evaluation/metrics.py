"""Figures of classifiers: `evaluate.Metric` classes that need no download, and Trainer's `compute_metrics`."""

# Shape letters in this file
#   n images   K classes

from collections.abc import Callable, Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, List, Value
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers import EvalPrediction

from .table import top_k_correct


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
        problem_type: "single_label_classification" or None: `top1` and `top5`, in percent.
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
        scores: Any = prediction.predictions
        # A model that also returns hidden states gives a tuple, logits first.
        scores = np.asarray(scores[0] if isinstance(scores, tuple) else scores, dtype=np.float32)
        return measure(scores, np.asarray(prediction.label_ids))

    return compute_metrics


def _single_label(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {f"top{k}": top_k_percent(scores, labels, k) for k in (1, 5)}


def _multi_label(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores (n, K) and labels (n, K) of 0 and 1."""
    positives = labels.sum(axis=0)
    some, not_all = positives > 0, positives < len(labels)
    precisions = [average_precision_score(labels[:, c], scores[:, c]) for c in np.flatnonzero(some)]
    areas = [roc_auc_score(labels[:, c], scores[:, c]) for c in np.flatnonzero(some & not_all)]
    return {name: float(np.mean(v)) if v else float("nan") for name, v in (("map", precisions), ("auroc", areas))}


def _regression(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores (n, ...) and labels of the same size, but any shape: (n, 1) and (n,) match."""
    return {"mae": float(np.abs(scores.reshape(labels.shape) - labels).mean())}
