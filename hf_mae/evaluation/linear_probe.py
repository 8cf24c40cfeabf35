"""Linear probing on frozen features, the fast protocol: logistic regression on a cached feature table."""

import warnings

from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .features import Features


def fast_linear_accuracy(train: Features, test: Features, c: float = 0.1, max_iter: int = 300) -> dict[str, float]:
    """Top-1 accuracy of a logistic regression on standardised features.

    Not the paper's protocol (no crops, no LARS); it ranks encoders in seconds.

    Args:
        train: what it learns from.
        test: what it classifies.
        c: inverse strength of the L2 penalty.
        max_iter: limit of the solver.

    Returns:
        `linear_top1`, in percent.
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=max_iter))
    with warnings.catch_warnings():
        # Stopping at max_iter is part of the protocol: equal effort for every encoder.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(train.values.numpy(), train.labels.numpy())
    return {"linear_top1": 100 * float(classifier.score(test.values.numpy(), test.labels.numpy()))}
