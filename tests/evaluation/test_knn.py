"""kNN on feature tables; classifiers on small and hopeless tables."""

import math

import numpy as np
import pytest
import torch
from features import clusters, random_features

from hf_mae.evaluation.fast_linear import fast_linear_accuracy
from hf_mae.evaluation.knn import knn_accuracy, nearest_rows
from hf_mae.evaluation.table import Features


def test_planted_clusters_are_found():
    train, test = clusters(200, 1), clusters(100, 2)
    assert knn_accuracy(train, test, ks=(5, 20)) == {"knn_top1_k5": 100.0, "knn_top1_k20": 100.0}
    assert fast_linear_accuracy(train, test)["linear_top1"] == 100


def test_the_nearest_neighbour_of_a_bank_row_is_itself():
    bank = random_features(300, 0)
    assert knn_accuracy(bank, bank, ks=(1,)) == {"knn_top1_k1": 100.0}


def test_votes_are_weighted_by_similarity():
    # One neighbour of class 0 at similarity 1 against two of class 1 at similarity 0.9: exp(1/t) or 2 exp(0.9/t).
    near, far = torch.tensor([1.0, 0.0]), torch.tensor([0.9, math.sqrt(1 - 0.81)])
    bank, query = Features(torch.stack([near, far, far]), torch.tensor([0, 1, 1])), torch.stack([near])
    for temperature, expected in ((0.07, 0), (1.0, 1)):
        assert (math.exp(0.1 / temperature) > 2) == (expected == 0)
        test = Features(query, torch.tensor([expected]))
        assert knn_accuracy(bank, test, ks=(3,), temperature=temperature) == {"knn_top1_k3": 100.0}


@pytest.mark.parametrize(("query_chunk", "bank_chunk"), [(1024, 65_536), (7, 13), (1, 1), (50, 300)])
def test_knn_in_chunks_is_knn_the_obvious_way(query_chunk, bank_chunk):
    bank, queries, ks = random_features(300, 0, classes=5), random_features(50, 1, classes=5), (1, 10, 200, 1000)
    values, asked = (table.values.numpy().astype(np.float64) for table in (bank, queries))
    correct = dict.fromkeys(ks, 0)
    for row, label in zip(asked, queries.labels.tolist(), strict=True):
        cosines = values @ row / np.linalg.norm(values, axis=1) / np.linalg.norm(row)
        for k in ks:
            votes = np.zeros(5)
            for neighbour in np.argsort(-cosines)[:k]:
                votes[bank.labels[neighbour]] += np.exp(cosines[neighbour] / 0.7)
            correct[k] += votes.argmax() == label
    found = knn_accuracy(bank, queries, ks, 0.7, query_chunk=query_chunk, bank_chunk=bank_chunk)
    assert found == {f"knn_top1_k{k}": 100 * count / 50 for k, count in correct.items()}
    assert len(set(found.values())) > 2  # the numbers of neighbours matter


def test_neighbours_found_in_chunks_are_the_most_similar_rows():
    bank, queries = random_features(97, 0).values, random_features(11, 1).values
    similarity, rows = nearest_rows(queries, bank, 9, bank_chunk=10)
    cosines = torch.cosine_similarity(queries.unsqueeze(1), bank.unsqueeze(0), dim=2)
    expected = cosines.topk(9, dim=1)
    torch.testing.assert_close(similarity, expected.values)
    assert torch.equal(rows, expected.indices)


def test_a_low_temperature_does_not_overflow():
    bank = random_features(300, 0)
    assert knn_accuracy(bank, bank, ks=(20,), temperature=1e-3) == {"knn_top1_k20": 100.0}


def test_labels_at_random_are_not_learnt():
    train, test = (Features(random_features(400, seed).values, torch.arange(400) % 4) for seed in (0, 1))
    assert knn_accuracy(train, test, ks=(20,))["knn_top1_k20"] < 40
    assert fast_linear_accuracy(train, test)["linear_top1"] < 40


def test_one_query_and_a_bank_of_two_are_enough():
    train = Features(torch.eye(2), torch.tensor([0, 1]))
    test = Features(torch.tensor([[0.9, 0.1]]), torch.tensor([0]))
    assert knn_accuracy(train, test) == dict.fromkeys([f"knn_top1_k{k}" for k in (10, 20, 100, 200)], 100.0)
    assert fast_linear_accuracy(train, test)["linear_top1"] == 100
