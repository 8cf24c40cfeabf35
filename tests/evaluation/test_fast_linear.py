"""The fast linear protocol against scikit-learn."""

import numpy as np
import pytest
import torch
from features import clusters, random_features
from sklearn.linear_model import LogisticRegression

from hf_mae.evaluation.fast_linear import fast_linear_accuracy, logistic_regression
from hf_mae.evaluation.table import Features


@pytest.mark.parametrize("penalty", [1e-1, 1e-2, 1e-3])
def test_the_logistic_regression_is_scikit_learns(penalty):
    table = random_features(200, 0, classes=3)
    found = logistic_regression(table.values, table.labels, penalty, torch.zeros(3, 9), max_iter=200)
    expected = LogisticRegression(C=1 / (penalty * 200), tol=1e-8, max_iter=1000)
    expected.fit(table.values.double().numpy(), table.labels.numpy())
    np.testing.assert_allclose(found[:, :-1], expected.coef_, atol=1e-3)
    # One constant for all biases is free.
    np.testing.assert_allclose(
        found[:, -1] - found[:, -1].mean(), expected.intercept_ - expected.intercept_.mean(), atol=1e-3
    )


def test_the_logistic_regression_does_not_depend_on_how_many_rows_are_held_at_once(monkeypatch):
    table = random_features(200, 0, classes=3)
    whole = logistic_regression(table.values, table.labels, 1e-2, torch.zeros(3, 9))
    monkeypatch.setattr("hf_mae.evaluation.fast_linear.ROWS", 17)
    torch.testing.assert_close(
        logistic_regression(table.values, table.labels, 1e-2, torch.zeros(3, 9)), whole, atol=1e-3, rtol=0
    )


def test_the_penalty_is_chosen_without_a_look_at_the_rows_that_are_classified():
    train = random_features(60, 0, classes=2, width=50)
    test = Features(random_features(40, 1, width=50).values, torch.zeros(40, dtype=torch.long))
    other = Features(test.values, torch.ones(40, dtype=torch.long))
    found = [fast_linear_accuracy(train, table) for table in (test, other)]
    assert found[0]["linear_penalty"] == found[1]["linear_penalty"]
    assert found[0]["linear_top1"] == pytest.approx(100 - found[1]["linear_top1"])


def test_the_penalty_chosen_is_the_one_that_classifies_a_tenth_best():
    table = random_features(400, 3, classes=8, width=30)
    table.values[:, :8] += 1.2 * torch.eye(8)[table.labels]  # a weak sign of the class among noise
    values = (table.values - table.values.mean(dim=0)) / table.values.std(dim=0, correction=0)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    tenth, others = order[:40], order[40:]
    penalties, right = (1.0, 0.1, 0.01, 1e-5), []
    for penalty in penalties:
        slow = LogisticRegression(C=1 / (penalty * 360), tol=1e-8, max_iter=3000)
        slow.fit(values[others].numpy(), table.labels[others].numpy())
        right.append(slow.score(values[tenth].numpy(), table.labels[tenth].numpy()))
    best = right.index(max(right))  # the strongest of equally good ones
    assert best not in (0, 3)
    found = fast_linear_accuracy(table, table, penalties, max_iter=300)
    assert found["linear_penalty"] == penalties[best]


def test_a_feature_that_never_changes_is_left_out():
    train, test = clusters(100, 1), clusters(50, 2)
    for table in (train, test):
        table.values[:, 3] = 7.0
    assert fast_linear_accuracy(train, test)["linear_top1"] == 100
