import json
import tarfile
from copy import copy
from io import BytesIO

import numpy as np
import pytest
import torch
from memory_source import MemorySource, noise_images
from PIL import Image

from hf_mae.data.labels import Labels, find_labels, labels_of, named
from hf_mae.data.order import Rows
from hf_mae.data.sources import open_source
from hf_mae.errors import DataError

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


def rows(labels, names=None, **options) -> Rows:
    source = MemorySource(noise_images([len(labels)]), labels=labels)
    source.label_names = names
    return Rows(source, **options)


def targets(labels, problem, names=None):
    """Names of the classes and targets of a data set that is its own training set."""
    data = rows(labels, names)
    found = find_labels(data, problem)
    return found.names, found.targets(labels_of(data), data.source)


# ------------------------------------------------------------------------------------------ one class an image


@pytest.mark.parametrize(
    ("labels", "names", "classes", "expected"),
    [
        ([1, 0, 1], ["cat", "dog"], ("cat", "dog"), [1, 0, 1]),
        ([1, 0, 1], ["cat", "dog", "emu"], ("cat", "dog", "emu"), [1, 0, 1]),  # a class without images is one
        ([2, 10, 7, 2], None, ("2", "7", "10"), [0, 2, 1, 0]),  # numbers in the order of numbers
        (["dog", "ant", "dog"], None, ("ant", "dog"), [1, 0, 1]),
        ([True, False], None, ("False", "True"), [1, 0]),
        ([3, "x", 3], None, ("3", "x"), [0, 1, 0]),
        ([1.0, 0.0, 10.0, 2.0], None, ("0", "1", "2", "10"), [1, 0, 3, 2]),  # whole numbers are classes
        ([1.0, 0, 1], None, ("0", "1"), [1, 0, 1]),
        (["caf\u00e9", "the", "cafe\u0301"], None, ("caf\u00e9", "the"), [0, 1, 0]),  # the same text
        ([0, 1, 2], ["caf\u00e9", "the", "cafe\u0301"], ("caf\u00e9", "the"), [0, 1, 0]),
    ],
)
def test_classes_have_the_sources_names_or_those_that_are_found(labels, names, classes, expected):
    found, indices = targets(labels, SINGLE, names)
    assert found == classes
    assert indices.tolist() == expected
    assert indices.dtype == torch.int64


def test_another_split_is_matched_by_name_not_by_number():
    labels = find_labels(rows([0, 1], ["cat", "dog"]), SINGLE)
    other = rows([0, 1, 2], ["dog", "emu", "cat"])
    assert labels.targets([0, 2, 0], other.source).tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"has the label emu, which is not one of the model's 2 classes \(cat, dog\)"):
        labels.targets([0, 1], other.source)


def test_unnamed_numbers_match_named_classes_but_never_numbered_ones():
    unnamed = rows([0, 1]).source
    assert Labels(SINGLE, ("cat", "dog")).targets([1, 0], unnamed).tolist() == [1, 0]
    with pytest.raises(DataError, match="has the label 2, which is not one of the model's 2 classes"):
        Labels(SINGLE, ("cat", "dog")).targets([1, 2], unnamed)
    # Classes "1" and "2": the label 0 is no class, not the first one.
    with pytest.raises(DataError, match="has the label 0, which is not one of"):
        Labels(SINGLE, ("1", "2")).targets([1, 0], unnamed)


def test_numbers_of_any_type_match_classes_that_are_called_by_numbers():
    labels = find_labels(rows(list(range(3)), ["0", "10", "2"]), SINGLE)
    for values in ([10, 2, 0], [10.0, 2.0, 0.0], ["10", "2", "0"], [np.int8(10), 2, False]):
        assert labels.targets(values, rows([0, 1]).source).tolist() == [1, 2, 0]


def test_a_label_beyond_the_named_classes_is_an_error():
    source = rows([0, 1], ["cat", "dog"]).source
    with pytest.raises(DataError, match=r"has the label 2 \(of 2 named classes\)"):
        Labels(SINGLE, ("cat", "dog")).targets([0, 2], source)
    # Test sets of the Hub have -1 where labels are kept secret.
    with pytest.raises(DataError, match="1 of 2 images of split train of memory have no label"):
        Labels(SINGLE, ("cat", "dog")).targets([0, -1], source)


def test_names_of_classes_are_plain_text_wherever_labels_come_from():
    texts, numbers = rows(["a\x1b[0m", "b\n", "a\x1b[0m"]), rows([1, 0], ["a\x1b[0m", "b\n"])
    for data, first in ((texts, "a\\x1b[0m"), (numbers, "b\\n")):
        assert find_labels(data, SINGLE).names == ("a\\x1b[0m", "b\\n")
        assert named(labels_of(data)[0], data.source) == first
    assert find_labels(texts, SINGLE).targets([1, 0], numbers.source).tolist() == [1, 0]
    assert find_labels(rows(["a\x07; b", "b"]), MULTI).names == ("a\\x07", "b")


# ------------------------------------------------------------------------------------------ several, or numbers


def test_lists_of_classes_and_rows_of_zeros_and_ones_mean_the_same():
    expected = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    for labels, names in (
        ([["a", "c"], [], ["b"]], ("a", "b", "c")),
        ([[0, 2], [], [1]], ("0", "1", "2")),
        ([[1, 0, 1], [0, 0, 0], [0, 1, 0]], ("0", "1", "2")),
        ([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]], ("0", "1", "2")),
    ):
        found, values = targets(labels, MULTI)
        assert found == names
        assert values.tolist() == expected
        assert values.dtype == torch.float32


def test_lists_of_named_classes_have_all_names_also_unused_ones():
    # Two classes of two: indices, not zeros and ones.
    for labels, names, expected in (
        ([[0, 2], [], [2]], ["a", "b", "c"], [[1, 0, 1], [0, 0, 0], [0, 0, 1]]),
        ([[0, 1], [1, 0]], ["a", "b"], [[1, 1], [1, 1]]),
        ([[1, 1]], ["a", "b", "c"], [[0, 1, 0]]),
    ):
        found, values = targets(labels, MULTI, names)
        assert found == tuple(names)
        assert values.tolist() == expected
    other = rows([[0]], ["c", "a"]).source
    assert Labels(MULTI, ("a", "b", "c")).targets([[0], [0, 1]], other).tolist() == [[0, 0, 1], [1, 0, 1]]


def test_texts_are_lists_of_names():
    for labels, names, expected in (
        (["b; a", "", "c"], ("a", "b", "c"), [[1, 1, 0], [0, 0, 0], [0, 0, 1]]),
        (["b|a", "c|"], ("a", "b", "c"), [[1, 1, 0], [0, 0, 1]]),
        (["b,a"], ("a", "b"), [[1, 1]]),
        (["b;a, left", "b"], ("a, left", "b"), [[1, 1], [0, 1]]),  # one separator for all
        ([["b", "a"], ["c"]], ("a", "b", "c"), [[1, 1, 0], [0, 0, 1]]),
    ):
        found, values = targets(labels, MULTI)
        assert (found, values.tolist()) == (names, expected)
    labels = Labels(MULTI, ("a, left", "b"))
    assert labels.targets(["a, left", "b"], rows([0]).source).tolist() == [[1, 0], [0, 1]]  # known names stay whole
    with pytest.raises(DataError, match="has the label d, which is not one of the model's 2 classes"):
        labels.targets(["b;d"], rows([0]).source)


def test_numbers_are_targets_as_they_are():
    assert targets([1, 2.5], "regression")[1].tolist() == [[1.0], [2.5]]
    names, values = targets([[1, 2], [3.5, -4]], "regression")
    assert values.tolist() == [[1.0, 2.0], [3.5, -4.0]]
    assert len(names) == 2


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("labels", "problem", "message"),
    [
        ([None, None], SINGLE, "2 of 2 images of split train of memory have no label; sort images into one folder per"),
        ([0, None, 1], SINGLE, "1 of 3 images .* have no label"),
        ([4, 4], SINGLE, r"memory has only one class \(4\); two or more are needed"),
        ([0.5, 1.5], SINGLE, "memory has the label 0.5, .* pass --problem_type regression"),
        ([[0, 1], [1]], SINGLE, r"has the label \[0, 1\], .* pass --problem_type multi_label_classification"),
        ([0, 1], MULTI, "has the label 0, .* pass --problem_type single_label_classification"),
        ([0.5, 0.1], MULTI, "has the label 0.5, .* pass --problem_type regression"),
        (["a", "b"], "regression", "has the label a, not a finite number"),
        ([1.0, float("nan")], "regression", "has the label nan, not a finite number"),
        ([[0.0, 1.0], [0.5, 1.0]], MULTI, r"has the label \[0.0, 1.0\], .* pass --problem_type regression"),
        (["a", ""], SINGLE, "1 of 2 images .* have no label"),
        ([{"a": 1}], SINGLE, "which doesn't fit single_label_classification; choose another --label_col"),
        ([[1, 2], [3]], "regression", "has a label of 1 numbers, not 2"),
        ([[]], "regression", r"has the label \[\], not a finite number"),
    ],
)
def test_labels_that_do_not_fit_are_told_in_one_line(labels, problem, message):
    with pytest.raises(DataError, match=message) as caught:
        targets(labels, problem)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ labels of every source


def png(value: int) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_labels_of_every_kind_of_source_are_those_of_its_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("b/1.png", "a/2.png", "b/3.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(1))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    table = datasets.Dataset.from_dict({"image": [png(i) for i in range(3)], "label": [1, 0, 1]}, features=features)
    table.to_parquet(str(tmp_path / "table.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i, label in enumerate([5, 3, 5]):
            for ending, content in (("png", png(i)), ("json", json.dumps({"label": label}).encode())):
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
    expected = {"images": [0, 1, 1], "table.parquet": [1, 0, 1], "saved": [1, 0, 1], "shard.tar": [5, 3, 5]}
    for name, labels in expected.items():
        source = open_source(str(tmp_path / name))
        assert labels_of(Rows(source)) == labels, name
        assert [row.label for row in source.read(0, range(3))] == labels, name
    assert labels_of(Rows(open_source(str(tmp_path / "table.parquet"), streaming=True))) == [1, 0, 1]
    assert labels_of(Rows(open_source("digits")))[:5] == [0, 1, 2, 3, 4]


def test_labels_of_part_of_a_source_are_those_of_its_rows():
    data = rows(list(range(20)), max_samples=7)
    assert labels_of(data) == [row.label for row in data.read(data.index)]
    assert len(labels_of(data)) == 7


def test_a_column_of_lists_of_classes_keeps_the_names_of_all_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    classes = datasets.ClassLabel(names=["cyst", "mass", "edema"])
    features = datasets.Features({"image": datasets.Image(), "findings": datasets.List(classes)})
    table = {"image": [png(i) for i in range(3)], "findings": [[0, 2], [], [2]]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / "table.parquet"))
    for options in ({}, {"streaming": True}, {"label_column": "findings"}):
        data = Rows(open_source(str(tmp_path / "table.parquet"), **options))
        found = find_labels(data, MULTI)
        assert found.names == ("cyst", "mass", "edema")
        assert found.targets(labels_of(data), data.source).tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]


def test_class_folders_whose_names_differ_only_in_their_unicode_form_are_one_class(tmp_path):
    for i, name in enumerate(("caf\u00e9/1.png", "cafe\u0301/2.png", "the/3.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(i))
    source = open_source(str(tmp_path))
    assert source.label_names == ["caf\u00e9", "the"]
    assert {row.key: row.label for row in source.read(0, range(3))} == {
        "caf\u00e9/1.png": 0,
        "cafe\u0301/2.png": 0,
        "the/3.png": 1,
    }


def test_a_class_with_dashes_before_a_number_is_a_name():
    assert Labels(SINGLE, ("--5", "-5")).targets(["--5", -5], rows([0, 1]).source).tolist() == [0, 1]


def test_a_class_that_only_the_held_out_part_has_is_one_of_the_classes():
    train = rows([["a"], ["b"], ["a", "c"]])
    held_out = copy(train)
    train.index, held_out.index = np.array([0, 1]), np.array([2])
    assert find_labels(train, MULTI).names == ("a", "b")
    assert find_labels(train, MULTI, held_out).names == ("a", "b", "c")


def test_lists_of_two_classes_mean_in_evaluation_what_they_mean_in_training():
    numbers = find_labels(rows([[0], [1], [0, 1], []]), MULTI)
    every_image_has_both = rows([[0, 1], [1, 0]])
    assert numbers.targets(labels_of(every_image_has_both), every_image_has_both.source).tolist() == [[1, 1], [1, 1]]
    multi_hot = find_labels(every_image_has_both, MULTI)
    assert multi_hot.targets(labels_of(every_image_has_both), every_image_has_both.source).tolist() == [[0, 1], [1, 0]]
    three = rows([[0, 1, 1], [1, 0, 0]])
    names = Labels(MULTI, ("0", "1", "2"), multi_hot=False)
    assert names.targets(labels_of(three), three.source).tolist() == [[0, 1, 1], [1, 0, 0]]
