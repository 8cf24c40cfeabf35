"""Metrics of classifiers and regressors, for a Trainer."""

from collections.abc import Callable

import numpy as np
from transformers import EvalPrediction


def make_compute_metrics(problem_type: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """The figures of a kind of problem.

    Args:
        problem_type: "single_label_classification" (top1, top5 in percent), "multi_label_classification" (map, auroc)
            or "regression" (mae).
    """

    def single(p: EvalPrediction) -> dict[str, float]:
        order = np.argsort(-np.asarray(p.predictions), axis=1)
        hits = order == np.asarray(p.label_ids)[:, None]
        return {"top1": 100 * float(hits[:, 0].mean()), "top5": 100 * float(hits[:, :5].any(axis=1).mean())}

    def multi(p: EvalPrediction) -> dict[str, float]:
        from sklearn.metrics import average_precision_score, roc_auc_score

        return {
            "map": float(average_precision_score(p.label_ids, p.predictions)),
            "auroc": float(roc_auc_score(p.label_ids, p.predictions)),
        }

    def regression(p: EvalPrediction) -> dict[str, float]:
        return {"mae": float(np.abs(np.asarray(p.predictions) - np.asarray(p.label_ids)).mean())}

    return {"single_label_classification": single, "multi_label_classification": multi, "regression": regression}[
        problem_type
    ]
