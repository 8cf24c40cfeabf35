"""95 % bootstrap intervals: how far a figure would move with other evaluation images of the same kind."""

# Shape letters in this file
#   n images, P of them of a class   R resamples   G groups of images with equal scores

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
        measure: how often each image occurs in each resample, (n, R) int32 -> the figures of the resamples, (R, ...).
        images: n.

    Returns:
        (2, ...) lower and upper limits; NaN where no resample has the figure.
    """
    figures = np.concatenate([measure(counts) for counts in _resamples(images)])
    undefined = np.isnan(figures).all(axis=0)
    limits = np.nanpercentile(np.where(undefined, 0.0, figures), LIMITS, axis=0)
    return np.where(undefined, np.nan, limits)


def _resamples(images: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, (n, R) int32, for parts of all resamples; always the same ones."""
    rng, most = np.random.default_rng(0), max(1, COUNTS_AT_ONCE // images)
    for start in range(0, RESAMPLES, most):
        drawn = (rng.integers(images, size=images) for _ in range(start, min(start + most, RESAMPLES)))
        counts = np.stack([np.bincount(numbers, minlength=images) for numbers in drawn])
        yield np.ascontiguousarray(counts.T, dtype=np.int32)


def ranking(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average precision and area under the ROC curve of a class, as in scikit-learn, for many resamples at once.

    Args:
        scores: (n,) of the class.
        positive: (n,) 1 for the images of the class, else 0.
        counts: (n, R) int32 how often each image occurs.

    Returns:
        (R, 2) in [0, 1]; NaN where a resample has no image of the class or, for the area, only such images.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, is_hit = scores[order], positive[order] > 0
    starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))  # of the G groups, whose images have one rank
    groups = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(scores))))[is_hit]  # (P,) of the hits
    images = np.concatenate([np.zeros_like(counts[:1]), np.cumsum(counts[order], axis=0, dtype=np.int32)])  # (n + 1, R)
    drawn = counts[order[is_hit]]  # (P, R)
    hits = np.concatenate([np.zeros_like(counts[:1]), np.cumsum(drawn, axis=0, dtype=np.int32)])  # (P + 1, R)
    first, last = np.searchsorted(groups, groups), np.searchsorted(groups, groups, side="right")
    ends = np.append(starts[1:], len(scores))[groups]
    all_hits, all_misses = hits[-1].astype(np.float64), images[-1] - hits[-1]
    with np.errstate(invalid="ignore"):
        precision = (drawn * (hits[last] / np.maximum(images[ends], 1))).sum(axis=0) / all_hits
        misses_before, misses_through = images[starts[groups]] - hits[first], images[ends] - hits[last]
        pairs = drawn * (all_misses - (misses_before + misses_through) / 2.0)  # a tie is half a pair in order
        return np.stack([precision, pairs.sum(axis=0) / (all_hits * all_misses)], axis=1)
