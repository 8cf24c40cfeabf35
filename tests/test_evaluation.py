"""Frozen features, kNN and the fast linear probe."""

import math

import pytest
import torch
from tiny import tiny_config

from hf_mae import MAEForPreTraining, MAEImageProcessor
from hf_mae.data.sources import DataError, open_source
from hf_mae.evaluation.features import EvaluateRecipe, Features, FrozenEncoder, extract_features, split_features
from hf_mae.evaluation.knn import knn_accuracy
from hf_mae.evaluation.linear_probe import fast_linear_accuracy


def clusters(n: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centres = 5 * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(4, (n,), generator=generator)
    return Features(centres[labels] + 0.3 * torch.randn(n, 16, generator=generator), labels)


def test_planted_clusters_are_found():
    train, test = clusters(200, 1), clusters(100, 2)
    assert knn_accuracy(train, test, ks=(5, 20)) == {"knn_top1_k5": 100.0, "knn_top1_k20": 100.0}
    assert fast_linear_accuracy(train, test) == {"linear_top1": 100.0}


def test_the_nearest_neighbour_of_a_bank_row_is_itself():
    generator = torch.Generator().manual_seed(0)
    bank = Features(torch.randn(300, 8, generator=generator), torch.randint(10, (300,), generator=generator))
    assert knn_accuracy(bank, bank, ks=(1,)) == {"knn_top1_k1": 100.0}


def test_votes_are_weighted_by_similarity():
    # One neighbour of class 0 at similarity 1 against two of class 1 at similarity 0.9: exp(1/t) or 2 exp(0.9/t).
    near, far = torch.tensor([1.0, 0.0]), torch.tensor([0.9, math.sqrt(1 - 0.81)])
    bank, query = Features(torch.stack([near, far, far]), torch.tensor([0, 1, 1])), torch.stack([near])
    for temperature, expected in ((0.07, 0), (1.0, 1)):
        assert (math.exp(0.1 / temperature) > 2) == (expected == 0)
        test = Features(query, torch.tensor([expected]))
        assert knn_accuracy(bank, test, ks=(3,), temperature=temperature) == {"knn_top1_k3": 100.0}


def test_labels_at_random_are_not_learnt():
    generator = torch.Generator().manual_seed(0)
    train, test = (Features(torch.randn(400, 8, generator=generator), torch.arange(400) % 4) for _ in range(2))
    assert knn_accuracy(train, test, ks=(20,))["knn_top1_k20"] < 40


def test_a_sample_is_a_part_without_repetition_and_differs_by_seed():
    table = Features(torch.arange(100.0).unsqueeze(1), torch.arange(100))
    first, again, other = table.sample(0.2, 0), table.sample(0.2, 0), table.sample(0.2, 1)
    assert len(set(first.labels.tolist())) == 20
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)
    assert torch.equal(first.values[:, 0].long(), first.labels)


@pytest.fixture
def folder(tmp_path):
    MAEForPreTraining(tiny_config(image_size=8, patch_size=4, num_channels=1)).save_pretrained(tmp_path)
    processor = MAEImageProcessor(
        num_channels=1,
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        image_mean=[0.3],
        image_std=[0.4],
    )
    processor.save_pretrained(tmp_path)
    return str(tmp_path)


def test_features_are_what_the_saved_processor_and_encoder_give(folder):
    recipe = EvaluateRecipe(model=folder, dataset="digits", max_samples=20, num_workers=0, batch_size=8)
    encoder, source = FrozenEncoder(folder, "mean"), open_source("digits")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    table = extract_features(encoder, source, recipe, 20)
    assert table.values.shape == (20, encoder.encoder.config.hidden_size)

    rows = torch.linspace(0, len(source) - 1, 20).round().long().tolist()
    images = [row.image for row in source.read(0, rows)]
    assert table.labels.tolist() == [row.label for row in source.read(0, rows)]
    pixel_values = MAEImageProcessor.from_pretrained(folder)(images, return_tensors="pt").pixel_values
    expected = encoder.encoder(pixel_values).last_hidden_state[:, 1:].mean(dim=1)
    torch.testing.assert_close(table.values, expected, atol=1e-5, rtol=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_what_can_not_be_evaluated_gets_one_line(folder, tmp_path):
    with pytest.raises(DataError, match="can't be loaded"):
        FrozenEncoder(str(tmp_path / "nothing"), "mean")
    with pytest.raises(DataError, match="split"):
        split_features(EvaluateRecipe(model=folder, dataset="digits", eval_split="nothing", num_workers=0))
