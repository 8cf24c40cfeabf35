"""Quality while training: the figures of the offline protocols, and a training that doesn't notice."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from features import table_of
from measure_in_processes import bright_rows, quality_of
from tiny import save_model

from hf_mae import MAEForPreTraining
from hf_mae.data.labels import class_numbers, common_classes
from hf_mae.evaluation.encoder import FrozenEncoder
from hf_mae.evaluation.fast_linear import fast_linear_accuracy
from hf_mae.evaluation.knn import knn_accuracy
from hf_mae.evaluation.online import rankme
from hf_mae.evaluation.table import Features


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model", drop_path_rate=0.5)


def measured(folder, bank, queries, **options):
    quality = quality_of(folder, Accelerator(cpu=True), bank, queries, **options)
    model = MAEForPreTraining.from_pretrained(folder).train()
    return quality.measure(model), quality, model


def test_the_figures_are_those_of_the_saved_model(folder):
    bank, queries = bright_rows(120), bright_rows(50, 1)
    found, quality, _ = measured(folder, bank, queries)
    encoder = FrozenEncoder(folder, "mean")
    train, test = (table_of(encoder, rows, 16) for rows in (bank, queries))
    classes = common_classes(train.labels, bank, test.labels, queries)
    pairs = (train, bank), (test, queries)
    tables = [Features(table.values, class_numbers(table.labels, rows.source, classes)) for table, rows in pairs]
    assert found == {
        "knn_top1": pytest.approx(knn_accuracy(*tables, ks=(20,))["knn_top1_k20"]),
        "linear_top1": pytest.approx(fast_linear_accuracy(*tables)["linear_top1"]),
        "rankme": pytest.approx(rankme(train.values), rel=1e-5),
    }
    assert found["linear_top1"] > 60  # brightness is to be seen, whatever the weights
    assert quality.notice is None


def test_every_module_is_in_its_old_mode_afterwards_and_no_weight_changed(folder):
    quality = quality_of(folder, Accelerator(cpu=True), bright_rows(60), bright_rows(30, 1))
    model = MAEForPreTraining.from_pretrained(folder).train()
    model.mae.layers[1].eval()  # frozen by the user
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = quality.measure(model), quality.measure(model)
    assert first == second  # no drop path, no mask
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="boom"):
        quality_of(folder, Accelerator(cpu=True), bright_rows(60), failing_rows()).measure(model)
    assert [module.training for module in model.modules()] == modes


def failing_rows():
    rows = bright_rows(30)

    def boom(*_):
        raise RuntimeError("boom")

    rows.source.read = boom
    return rows


def test_at_most_so_many_images_are_used(folder):
    bank, queries = bright_rows(500), bright_rows(300, 1)
    quality = quality_of(folder, Accelerator(cpu=True), bank, queries, samples=100)
    assert (len(quality.bank_rows), len(quality.query_rows)) == (100, 50)
    assert np.array_equal(quality.bank_rows.index, np.linspace(0, 499, 100).round())
    assert (len(bank), len(queries)) == (500, 300)
    few = quality_of(folder, Accelerator(cpu=True), bright_rows(7), bright_rows(1), samples=1000)
    assert (len(few.bank_rows), len(few.query_rows)) == (7, 1)


def test_without_labels_rankme_is_left_and_a_line_says_so(folder):
    bank, queries = bright_rows(60, labels=False), bright_rows(30, 1, labels=False)
    found, quality, _ = measured(folder, bank, queries)
    with_labels, _, _ = measured(folder, bright_rows(60), bright_rows(30, 1))
    assert found == {"rankme": with_labels["rankme"]}
    assert quality.notice.startswith("knn_top1 and linear_top1 are not measured: 60 of 60 images of split train")
    assert "--label_column" in quality.notice
    assert quality.measure(MAEForPreTraining.from_pretrained(folder)) == found
    assert quality.notice is None  # said once


@pytest.mark.parametrize("without", ["bank", "queries"])
def test_nothing_is_said_of_labels_that_are_known_to_be_missing(folder, without):
    rows = {"bank": bright_rows(60), "queries": bright_rows(30, 1)}
    rows[without].source.labels_from = None
    found, quality, _ = measured(folder, **rows)
    assert found.keys() == {"rankme"}
    assert (quality.unlabelled.source, quality.notice) == (rows[without].source, None)


def test_one_class_is_not_measured(folder):
    found, quality, _ = measured(folder, bright_rows(60, classes=1), bright_rows(30, 1))
    assert found.keys() == {"rankme"}
    assert "only one class (0)" in quality.notice


def test_classes_that_the_bank_happens_to_lack_count_as_wrong(folder):
    found, quality, _ = measured(folder, bright_rows(60, classes=2), bright_rows(300, 1, classes=3))
    share_known = sum(row.label < 14 for row in quality.query_rows.read(quality.query_rows.index)) / 300
    assert quality.notice is None
    assert 0 < found["knn_top1"] <= 100 * share_known < 80


def test_a_diverged_encoder_is_told_and_not_measured(folder):
    quality = quality_of(folder, Accelerator(cpu=True), bright_rows(60), bright_rows(30, 1))
    model = MAEForPreTraining.from_pretrained(folder)
    with torch.no_grad():
        model.mae.norm.bias[0] = float("nan")
    assert quality.measure(model) == {}
    assert quality.notice == "features are not finite numbers: their quality is not measured"
    with torch.no_grad():
        model.mae.norm.bias[0] = 0
    assert quality.measure(model).keys() == {"knn_top1", "linear_top1", "rankme"}
    assert quality.notice is None


def test_rankme_by_hand():
    # Singular values 3 and 1: shares 3/4 and 1/4, exp(entropy) = (4/3)^(3/4) * 4^(1/4).
    values = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert rankme(values) == pytest.approx((4 / 3) ** 0.75 * 4**0.25, abs=1e-5)
    assert rankme(torch.outer(torch.arange(1.0, 8), torch.arange(1.0, 6))) == pytest.approx(1, abs=1e-4)
    orthogonal = torch.linalg.qr(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)))[0]
    assert rankme(2.5 * orthogonal) == pytest.approx(5, abs=1e-4)
