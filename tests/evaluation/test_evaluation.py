"""Frozen features, kNN, RankMe, labels, results.json, and `hf-mae evaluate`."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from memory_source import MemorySource, noise_images
from PIL import Image
from runs import start
from sklearn.linear_model import LogisticRegression
from tiny import tiny

from hf_mae import MAEConfig, MAEForPreTraining, MAEImageProcessor, MAEModel
from hf_mae.data.labels import class_numbers, common_classes
from hf_mae.data.order import Rows
from hf_mae.data.sources import open_source, open_splits
from hf_mae.errors import DataError
from hf_mae.evaluation.encoder import FrozenEncoder
from hf_mae.evaluation.knn import knn_accuracy, nearest
from hf_mae.evaluation.linear_probe import fast_linear_accuracy, logistic_regression
from hf_mae.evaluation.table import Features, extract_table, rankme, top_k_correct
from hf_mae.keys.data_keys import SplitKeys
from hf_mae.run_folder import add_result, read_results
from hf_mae.training.build import open_data
from hf_mae.training.recipe import load_pretrain_recipe


def clusters(n: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centres = 5 * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(4, (n,), generator=generator)
    return Features(centres[labels] + 0.3 * torch.randn(n, 16, generator=generator), labels)


def random_features(n: int, seed: int, classes: int = 10, width: int = 8) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(n, width, generator=generator), torch.randint(classes, (n,), generator=generator))


# ------------------------------------------------------------------------------------------ kNN


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
    similarity, rows = nearest(queries, bank, 9, bank_chunk=10)
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


# ------------------------------------------------------------------------------------------ fast linear, RankMe


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
    monkeypatch.setattr("hf_mae.evaluation.linear_probe.ROWS", 17)
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


def test_rankme_by_hand():
    # Singular values 3 and 1: shares 3/4 and 1/4, exp(entropy) = (4/3)^(3/4) * 4^(1/4).
    values = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert rankme(values) == pytest.approx((4 / 3) ** 0.75 * 4**0.25, abs=1e-5)
    assert rankme(torch.outer(torch.arange(1.0, 8), torch.arange(1.0, 6))) == pytest.approx(1, abs=1e-4)
    orthogonal = torch.linalg.qr(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)))[0]
    assert rankme(2.5 * orthogonal) == pytest.approx(5, abs=1e-4)


# ------------------------------------------------------------------------------------------ samples and labels


def test_a_sample_is_a_part_without_repetition_and_differs_by_seed():
    table = Features(torch.arange(100.0).unsqueeze(1), torch.arange(100))
    first, again, other = table.sample(0.2, 0), table.sample(0.2, 0), table.sample(0.2, 1)
    assert len(set(first.labels.tolist())) == 20
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)
    assert torch.equal(first.values[:, 0].long(), first.labels)


def rows_of(labels, names=None) -> Rows:
    source = MemorySource(noise_images([len(labels)]), labels=labels)
    source.label_names = names
    return Rows(source)


def numbered(train, test, **options):
    rows, eval_rows = rows_of(train, options.pop("names", None)), rows_of(test, options.pop("eval_names", None))
    classes = common_classes(train, rows, test, eval_rows, **options)
    return class_numbers(train, classes).tolist(), class_numbers(test, classes).tolist()


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ([700, 3, 10**12], [3, 700]),  # gaps
        ([2.0, 1.0, 3.0], [1, 2]),  # whole numbers as floats
        (["dog", "cat", "eel"], ["cat", "dog"]),
        ([np.int64(5), np.int16(-1), np.int8(7)], [-1, 5]),  # no names: -1 is a class
        ([True, False, 2], [False, True]),
    ],
)
def test_classes_of_any_kind_are_numbered_without_gaps(train, test):
    found, asked = numbered(train, test)
    assert sorted(found) == [0, 1, 2]
    assert asked == [found[train.index(label)] for label in test]


@pytest.mark.parametrize(
    ("train", "test", "options", "words"),
    [
        ([0, None, 1], [0], {}, ["1 of 3 images", "no label", "--label_column"]),
        ([0, 1], [float("nan")], {}, ["1 of 1 images", "no label"]),
        ([0, 1], [-1, -1], {"eval_names": ["a", "b"]}, ["2 of 2 images", "no label"]),
        ([0.37, 1.0], [1], {}, ["label 0.37", "no class"]),
        ([[0, 1], [1, 0]], [[0, 1]], {}, ["label [0, 1]", "no class"]),
        ([float("inf"), 1.0], [1], {}, ["label inf", "no class"]),
        ([4, 4, 4], [4], {}, ["3 images", "one class only (4)", "two or more"]),
        ([0, 1], [0, 5, 6], {}, ["2 of 3 classes", "the first 5", "the 2 of", "more images"]),
        ([0, 1], [0, 1], {"names": ["cat", "dog"], "eval_names": ["cat", "eel"]}, ["class 1 is 'dog'", "'eel'"]),
        ([0, 1], [0, 1], {"names": ["cat", "dog"], "eval_names": ["cat"]}, ["class 1 is 'dog'", "None"]),
    ],
)  # fmt: skip
def test_labels_that_will_not_do_get_one_line(train, test, options, words):
    with pytest.raises(DataError) as raised:
        numbered(train, test, **options)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_classes_that_can_not_be_learnt_may_be_allowed_and_are_wrong():
    (found, asked) = numbered([3, 5], [9, 3], all_known=False)
    assert (found, asked) == ([0, 1], [2, 0])
    train = Features(torch.eye(2), torch.tensor(found))
    test = Features(torch.eye(2), torch.tensor(asked))
    assert knn_accuracy(train, test, ks=(2,)) == {"knn_top1_k2": 0.0}
    assert fast_linear_accuracy(train, test)["linear_top1"] == 0


def test_a_label_is_among_the_first_k_by_hand():
    scores, labels = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.5, 0.1]]), torch.tensor([2, 2])
    assert [top_k_correct(scores, labels, k) for k in (1, 2, 3, 9)] == [0, 1, 2, 2]


# ------------------------------------------------------------------------------------------ features


def save_model(folder, channels=1, size=(8, 8), patch=4, dtype_factor=1 / 255, **keys):
    """A tiny pretrained model with its image processor; the folder's name."""
    torch.manual_seed(0)
    model = tiny(MAEForPreTraining, image_size=list(size), patch_size=patch, num_channels=channels, **keys)
    model.save_pretrained(folder)
    MAEImageProcessor(
        num_channels=channels,
        size={"height": size[0], "width": size[1]} if size[0] != size[1] else {"shortest_edge": size[0]},
        crop_size={"height": size[0], "width": size[1]},
        image_mean=[0.3] * channels,
        image_std=[0.4] * channels,
        rescale_factor=dtype_factor,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model")


def table_of(encoder, rows, batch_size=8):
    return extract_table(encoder, rows, encoder.spec, batch_size, 0, Accelerator(cpu=True))


@pytest.mark.parametrize("pooling", ["mean", "cls", "both", "patches"])
def test_features_are_what_the_saved_processor_and_encoder_give(folder, pooling):
    encoder, source = FrozenEncoder(folder, pooling), open_source("digits")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    table = table_of(encoder, Rows(source, max_samples=20))
    rows = torch.linspace(0, len(source) - 1, 20).round().long().tolist()
    images = [row.image for row in source.read(0, rows)]
    assert table.labels == [row.label for row in source.read(0, rows)]
    assert table.keys == [row.key for row in source.read(0, rows)]
    pixel_values = MAEImageProcessor.from_pretrained(folder)(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        tokens = MAEModel.from_pretrained(folder)(pixel_values).last_hidden_state
    expected = {
        "mean": sum(tokens[:, 1 + patch] for patch in range(4)) / 4,
        "cls": tokens[:, 0],
        "both": torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1),
        "patches": tokens[:, 1:],
    }[pooling]
    torch.testing.assert_close(table.values, expected, atol=1e-5, rtol=0)
    if pooling != "patches":
        assert table.values.shape == (20, encoder.width)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("channels", "size", "patch", "dtype"),
    [(13, (24, 16), (8, 4), np.uint16), (2, (8, 24), 4, np.float32), (3, (16, 16), 8, np.uint8)],
)  # fmt: skip
def test_images_of_any_shape_channels_and_type_have_features(tmp_path, channels, size, patch, dtype):
    factor = {np.uint8: 1 / 255, np.uint16: 1 / 65535, np.float32: 1.0}[dtype]
    folder = save_model(tmp_path / "model", channels, size, patch, factor)
    images = noise_images([6], (20, 18, channels), dtype)
    encoder = FrozenEncoder(folder, "mean")
    table = table_of(encoder, Rows(MemorySource(images)), batch_size=4)
    pixel_values = MAEImageProcessor.from_pretrained(folder)(
        list(images[0].transpose(0, 3, 1, 2)), return_tensors="pt", input_data_format="channels_first"
    ).pixel_values
    with torch.no_grad():
        expected = MAEModel.from_pretrained(folder)(pixel_values).pooler_output
    # The two libraries' filters may differ by a step of the pixels' unit.
    torch.testing.assert_close(table.values, expected, atol=2e-2, rtol=0)
    assert table.values.std(dim=0).mean() > 1e-3


def test_features_do_not_depend_on_the_size_of_the_batch(tmp_path):
    folder = save_model(tmp_path / "model", 3, (32, 32), 8)
    encoder, rows = FrozenEncoder(folder, "mean"), Rows(MemorySource(noise_images([37], (40, 36, 3))))
    tables = [table_of(encoder, rows, batch_size).values for batch_size in (1, 7, 16, 64)]
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], atol=1e-6, rtol=0)


def test_a_model_saved_in_half_precision_is_used_in_float32(folder, tmp_path):
    MAEForPreTraining.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    MAEImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "half")
    encoder = FrozenEncoder(str(tmp_path / "half"), "mean")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_autocast_changes_features_a_little(folder):
    rows = Rows(open_source("digits"), max_samples=20)
    exact, fast = (table_of(FrozenEncoder(folder, "mean", how), rows).values for how in ("no", "bf16"))
    assert fast.dtype == torch.float32
    assert 0 < (exact - fast).abs().max() < 0.1


def test_a_frozen_encoder_can_not_be_put_into_training_mode(folder):
    encoder = FrozenEncoder(folder, "mean")
    torch.nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_images_that_can_not_be_decoded_are_left_out_and_named(folder):
    images = [
        bytes([number]) * 9 if number in (3, 4, 5, 11) else image for number, image in enumerate(noise_images([12])[0])
    ]
    table = table_of(FrozenEncoder(folder, "mean"), Rows(MemorySource([images], labels=range(12))), batch_size=2)
    assert table.labels == [0, 1, 2, 6, 7, 8, 9, 10]
    assert table.values.shape[0] == 8
    assert set(table.bad) <= {(f"shard0#{number}", "UnidentifiedImageError") for number in (3, 4, 5, 11)}
    assert ("shard0#3", "UnidentifiedImageError") in table.bad
    assert table.num_rows == 12


def test_nothing_but_bad_images_is_an_error(folder):
    with pytest.raises(DataError, match="none of the 3 images of split train of memory can be decoded"):
        table_of(FrozenEncoder(folder, "mean"), Rows(MemorySource([[b"no"] * 3])))


def test_the_split_that_is_held_out_is_the_one_of_pretraining():
    recipe = load_pretrain_recipe(["--recipe", "quickstart"])
    data = open_data(recipe)
    rows, eval_rows, evaluated_on = open_splits(SplitKeys(dataset="digits"))
    assert np.array_equal(rows.index, data.rows.index)
    assert np.array_equal(eval_rows.index, data.eval_rows.index)
    assert evaluated_on == data.evaluated_on


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture
def mistake(capfd):
    """Starts a command that has to fail by the user's mistake; the message."""

    def message(*words) -> str:
        capfd.readouterr()
        assert start(*words) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        assert lines[-1].startswith("hf-mae: error: "), lines
        assert "Traceback" not in "".join(lines)
        return lines[-1].removeprefix("hf-mae: error: ")

    return message


def command(protocol, folder, *words):
    few = ["--num_workers", 0, "--max_samples", 120, "--max_eval_samples", 40]
    return ["evaluate", protocol, "--model", folder, "--dataset", "digits", *few, *words]


def test_results_of_several_evaluations_stand_side_by_side_in_the_models_folder(folder, capsys, tmp_path):
    assert start(*command("knn", folder, "--k", 1, 5)) == 0
    printed = capsys.readouterr().out
    assert start(*command("linear-probe", folder)) == 0
    assert start(*command("knn", folder, "--k", 5, 1, "--pooling", "cls")) == 0
    path = tmp_path / "model" / "results.json"
    results = json.loads(path.read_text())
    assert [(r["protocol"]["name"], r["protocol"]["pooling"]) for r in results] == [
        ("knn", "mean"), ("linear_probe_fast", "mean"), ("knn", "cls"),
    ]  # fmt: skip
    assert f"{results[0]['figures']['knn_top1_k5']:.2f} %" in printed
    assert printed.splitlines()[-1] == f"added to {path}"
    assert results[0]["data"] == {
        "dataset": "digits", "config": None, "revision": None, "split": "train",
        "evaluated_on": "5% of train, held out by a hash of each row's place", "max_samples": 120,
        "max_eval_samples": 40, "train_images": 120, "eval_images": 40, "classes": 10,
    }  # fmt: skip
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert results[0]["checkpoint"] == {"path": folder, "sha256": hashlib.sha256(weights).hexdigest()}
    assert {"hf_mae", "torch", "transformers"} <= results[0]["versions"].keys()
    # Once more: in place of the first.
    assert start(*command("knn", folder, "--k", 1, 5)) == 0
    again = json.loads(path.read_text())
    assert len(again) == 3
    assert again[-1] == results[0]


def test_the_commands_figures_are_those_of_the_functions(folder, tmp_path):
    out = tmp_path / "there" / "figures.json"
    assert start(*command("knn", folder, "--results", out, "--k", 1, 20, "--temperature", 0.1)) == 0
    assert start(*command("linear-probe", folder, "--results", out)) == 0
    assert not (tmp_path / "model" / "results.json").exists()
    rows, eval_rows, _ = open_splits(SplitKeys(dataset="digits", max_samples=120, max_eval_samples=40))
    encoder = FrozenEncoder(folder, "mean")
    train, test = (
        Features(table.values, torch.tensor(table.labels))
        for table in (table_of(encoder, part) for part in (rows, eval_rows))
    )
    knn, linear = read_results(out)
    assert knn["figures"] == pytest.approx(knn_accuracy(train, test, (1, 20), 0.1))
    assert linear["figures"] == pytest.approx(fast_linear_accuracy(train, test))
    assert "ranges" not in knn


def test_repetitions_give_a_mean_and_a_range(folder, tmp_path):
    out = tmp_path / "figures.json"
    assert start(*command("knn", folder, "--results", out, "--k", 1, "--seeds", 3, "--fraction", 0.5)) == 0
    (result,) = read_results(out)
    low, high = result["ranges"]["knn_top1_k1"]
    assert low < result["figures"]["knn_top1_k1"] < high
    assert (result["protocol"]["seeds"], result["protocol"]["fraction"]) == (3, 0.5)


def test_no_results_are_written_where_none_are_wanted(folder, tmp_path, capsys):
    assert start(*command("knn", folder, "--results", "none")) == 0
    assert "written nowhere" in capsys.readouterr().out
    assert not (tmp_path / "model" / "results.json").exists()


def test_a_file_that_holds_something_else_is_not_overwritten(folder, tmp_path, mistake):
    other = tmp_path / "notes.json"
    for text in ("precious", '{"a": 1}', "[1, 2]"):
        other.write_text(text)
        assert "is no list of results" in mistake(*command("knn", folder, "--results", other))
        assert other.read_text() == text
    with pytest.raises(DataError, match="can't be written"):
        add_result({"protocol": 1, "data": 2, "checkpoint": 3, "figures": {}}, other / "below")


def class_folder(path, classes, count=3):
    rng = np.random.default_rng(0)
    for name in classes:
        (path / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (9, 9), np.uint8)).save(path / name / f"{number}.png")
    return path


MISTAKES = {
    "no such model": (["--model", "./nothing"], ["--model ./nothing can't be loaded"]),
    "no such split": (["--eval_split", "nothing"], ["'nothing'", "choose one of: train"]),
    "no neighbours": (["--k", "0"], ["k [0]"]),
    "cold": (["--temperature", "0"], ["temperature 0"]),
    "no images": (["--max_samples", "0"], ["max_samples 0 is too small"]),
    "no repetitions": (["--seeds", "0"], ["seeds 0 is too small"]),
    "too large a share": (["--fraction", "1.5"], ["fraction 1.5 lies outside (0, 1]"]),
    "a misspelt key": (["--temprature", "1"], ["unknown argument '--temprature'; did you mean '--temperature'?"]),
    "one image": (["--max_samples", "1"], ["1 images of split train of digits have one class only"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_can_not_be_evaluated_gets_one_line(case, folder, mistake):
    words, expected = MISTAKES[case]
    message = mistake(*command("knn", folder, *words))
    for words in expected:
        assert words in message


def test_folders_that_will_not_do_get_one_line(folder, tmp_path, mistake):
    def message(train, test):
        return mistake(
            "evaluate", "knn", "--model", folder, "--dataset", train, "--eval_dataset", test, "--num_workers", 0
        )

    animals = class_folder(tmp_path / "animals", ["cat", "dog"])
    others = class_folder(tmp_path / "others", ["cat", "eel"])
    flat = class_folder(tmp_path / "flat", [""])
    assert "class 1 is 'dog' in split train of" in message(animals, others)
    assert "have no label; name their column by --label_column" in message(animals, flat)
    assert "have no label" in message(flat, animals)
    (animals / "cat" / "1.png").write_bytes(b"broken")
    assert "1 of the 6 images" in (found := message(animals, animals))
    assert "UnidentifiedImageError 1; the first is cat/1.png" in found
    assert "more than max_bad_fraction 1.0%" in found


def test_bad_images_up_to_the_allowed_share_are_told(folder, tmp_path, caplog):
    animals = class_folder(tmp_path / "animals", ["cat", "dog"])
    (animals / "cat" / "1.png").write_bytes(b"broken")
    out = tmp_path / "figures.json"
    words = ["--num_workers", 0, "--max_bad_fraction", 0.2, "--results", out]
    assert start("evaluate", "knn", "--model", folder, "--dataset", animals, "--eval_dataset", animals, *words) == 0
    (result,) = read_results(out)
    assert (result["data"]["train_images"], result["data"]["eval_images"]) == (5, 5)
    assert "1 of the 6 images" in caplog.text
    assert "cat/1.png" in caplog.text


def test_a_model_of_another_kind_is_not_taken_for_one_of_ours(tmp_path, mistake):
    from transformers import ViTConfig, ViTModel

    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ViTModel(ViTConfig(**sizes, intermediate_size=96)).save_pretrained(tmp_path / "vit")
    MAEImageProcessor().save_pretrained(tmp_path / "vit")
    assert "is a model of type vit, not mae; convert it: hf-mae convert" in mistake(*command("knn", tmp_path / "vit"))
    # Its weights under a configuration of ours.
    MAEConfig(**sizes, intermediate_size=96).save_pretrained(tmp_path / "vit")
    assert "not a model of hf_mae" in mistake(*command("knn", tmp_path / "vit"))


def test_features_that_are_not_finite_are_an_error(tmp_path, mistake):
    folder = save_model(tmp_path / "model")
    model = MAEForPreTraining.from_pretrained(folder)
    with torch.no_grad():
        model.mae.norm.weight[0] = math.nan
    model.save_pretrained(folder)
    assert "are not finite; its training has diverged" in mistake(*command("knn", folder))
