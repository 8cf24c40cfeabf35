"""Bootstrap intervals and ranking figures, against scikit-learn, scipy and the slow obvious way."""

import numpy as np
import pytest
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn.metrics import average_precision_score, roc_auc_score

from hf_mae.evaluation.intervals import RESAMPLES, accuracy_interval, bootstrap, ranking


@pytest.mark.parametrize("ties", [False, True])
def test_ranking_is_scikit_learns_in_every_resample(ties):
    rng = np.random.default_rng(0)
    positive = rng.integers(0, 2, 40)
    scores = positive + rng.normal(size=40)
    scores = scores.round() if ties else scores
    counts = rng.integers(0, 3, (40, 5), dtype=np.int32)
    for found, weights in zip(ranking(scores, positive, counts), counts.T, strict=True):
        expected = [
            measure(positive, scores, sample_weight=weights) for measure in (average_precision_score, roc_auc_score)
        ]
        assert found == pytest.approx(expected)


def test_a_class_without_images_has_no_figure_and_one_of_all_images_no_area():
    scores, counts = np.array([3.0, 2.0, 1.0]), np.ones((3, 1), np.int32)
    assert np.isnan(ranking(scores, np.zeros(3), counts)).all()
    precision, area = ranking(scores, np.ones(3), counts)[0]
    assert precision == 1
    assert np.isnan(area)


def test_a_resample_without_the_class_has_no_figure():
    found = ranking(np.array([2.0, 1.0]), np.array([1, 0]), np.array([[1, 0, 2], [1, 2, 0]], np.int32))
    assert found[:, 0] == pytest.approx([1, np.nan, 1], nan_ok=True)
    assert found[:, 1] == pytest.approx([1, np.nan, np.nan], nan_ok=True)


def test_the_interval_of_an_accuracy_is_that_of_many_resamples():
    hits = np.repeat([1.0, 0.0], [183, 47])
    drawn = np.random.default_rng(0).choice(hits, (20_000, len(hits))).mean(axis=1)
    expected = 100 * np.percentile(drawn, [2.5, 97.5])
    assert accuracy_interval(100 * hits.mean(), len(hits)) == pytest.approx(expected)


def test_an_accuracy_of_0_or_100_percent_varies_in_no_resample():
    assert accuracy_interval(0.0, 10) == [0, 0]
    assert accuracy_interval(100.0, 10) == [100, 100]


def test_intervals_of_a_mean_are_about_scipys_and_always_the_same():
    values = np.random.default_rng(0).exponential(size=300)
    found = bootstrap(lambda counts: values @ counts / 300, 300)
    expected = scipy_bootstrap((values,), np.mean, n_resamples=5000, method="percentile", random_state=0)
    assert found == pytest.approx(expected.confidence_interval, rel=0.02)
    assert np.array_equal(found, bootstrap(lambda counts: values @ counts / 300, 300))


def test_every_resample_draws_as_many_images_and_there_are_a_thousand():
    drawn = []
    bootstrap(lambda counts: drawn.append(counts) or counts[0], 5000)  # more than one part
    assert len(drawn) > 1
    counts = np.concatenate(drawn, axis=1)
    assert counts.shape == (5000, RESAMPLES)
    assert (counts.sum(axis=0) == 5000).all()


def test_a_figure_that_some_resamples_lack_has_an_interval_from_the_others():
    found = bootstrap(lambda counts: np.where(counts[:1].T > 0, counts[:1].T, np.nan) / [1, np.nan], 2)
    assert found[:, 0].tolist() == [1, 2]
    assert np.isnan(found[:, 1]).all()
