"""95 % bootstrap intervals: how far a figure would move with other evaluation images of the same kind."""

# Shape letters in this file
#   n images   R resamples   G groups of images with equal scores

from collections.abc import Callable, Iterator

import numpy as np
from scipy.stats import binom

RESAMPLES = 1000
LIMITS = (2.5, 97.5)  # percentiles
COUNTS_AT_ONCE = 2**22  # of R * n


def accuracy_interval(percent: float, images: int) -> list[float]:
    """The interval of an accuracy in percent, on `images` images.

    A resample's number of hits has a binomial distribution, so its percentiles are those of infinitely many resamples.
    """
    hits = binom.ppf(np.divide(LIMITS, 100), images, percent / 100)
    return [100 * float(number) / images for number in hits]


def bootstrap(measure: Callable[[np.ndarray], np.ndarray], images: int) -> np.ndarray:
    """The intervals of figures that are measured on n = `images` images.

    Args:
        measure: how often each image occurs in each resample, (R, n) -> the figures of the resamples, (R, ...).
        images: n.

    Returns:
        (2, ...) lower and upper limits; NaN where no resample has the figure.
    """
    figures = np.concatenate([measure(counts) for counts in _resamples(images)])
    with np.errstate(invalid="ignore"):
        undefined = np.isnan(figures).all(axis=0)
        return np.nanpercentile(np.where(undefined, 0.0, figures), LIMITS, axis=0) + np.where(undefined, np.nan, 0.0)


def _resamples(images: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, (R, n), for parts of all resamples; always the same ones."""
    rng, most = np.random.default_rng(0), max(1, COUNTS_AT_ONCE // images)
    for start in range(0, RESAMPLES, most):
        drawn = (rng.integers(images, size=images) for _ in range(start, min(start + most, RESAMPLES)))
        yield np.stack([np.bincount(numbers, minlength=images) for numbers in drawn])


def ranking(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average precision and area under the ROC curve of one class in each resample; scikit-learn's, but for many.

    Args:
        scores: (n,) of the class.
        positive: (n,) 1 for the images of the class, else 0.
        counts: (R, n) how often each image occurs.

    Returns:
        (R, 2) in [0, 1]; NaN where a resample has no image of the class or, for the area, only such images.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # (G,) equal scores have one rank
    drawn = counts[:, order]
    images, hits = (np.cumsum(part, axis=1)[:, ends] for part in (drawn, drawn * positive[order]))  # (R, G)
    misses, new_hits = images - hits, np.diff(hits, axis=1, prepend=0)
    precision = hits / np.maximum(images, 1)
    pairs = (np.diff(misses, axis=1, prepend=0) * (hits - new_hits / 2)).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.stack([(precision * new_hits).sum(axis=1) / hits[:, -1], pairs / (hits * misses)[:, -1]], axis=1)
