"""Samples, class numbers and top-k of feature tables."""

import numpy as np
import pytest
import torch
from memory_source import MemorySource, noise_images

from hf_mae.data.labels import class_numbers, common_classes
from hf_mae.data.order import Rows
from hf_mae.errors import DataError
from hf_mae.evaluation.fast_linear import fast_linear_accuracy
from hf_mae.evaluation.knn import knn_accuracy
from hf_mae.evaluation.table import Features, top_k_correct


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
    return class_numbers(train, rows.source, classes).tolist(), class_numbers(test, eval_rows.source, classes).tolist()


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
    ("train", "names", "test", "eval_names", "expected"),
    [
        (range(3), ["0", "10", "2"], [0, 10, 2], None, [0, 1, 2]),  # class folders, then a column of numbers
        (range(3), ["0", "10", "2"], [2.0, 0.0, 10.0], None, [2, 0, 1]),
        (range(3), ["0", "10", "2"], ["10", "2", "0"], None, [1, 2, 0]),
        ([0, 10, 2], None, range(3), ["0", "10", "2"], [0, 2, 1]),  # numbers are numbered in their own order
        (range(3), ["00", "02", "10"], [0, 2, 10], None, [0, 1, 2]),
        (range(3), ["cat", "dog", "emu"], range(3), ["emu", "cat", "dog"], [2, 0, 1]),  # another order of names
        (range(3), ["cat", "dog", "emu"], range(3), ["emu", "eel", "cat"], None),
        (range(3), ["cat", "dog", "emu"], ["emu", "cat"], None, [2, 0]),
        (range(3), ["cat", "dog", "emu"], [2, 0], None, [2, 0]),  # numbers without names are indices
        ([0, 2], ["cat", "dog", "emu"], [2, 0], None, [1, 0]),  # of all names, also of unused ones
        ([True, False], None, [1, 0], None, [1, 0]),
        ([1, 0], None, [True, False], None, [1, 0]),
        ([0, 1], ["False", "True"], [True, False], None, [1, 0]),
        ([0, 1], ["cafe\u0301", "the"], ["caf\u00e9", "the"], None, [0, 1]),
    ],
)  # fmt: skip
def test_classes_of_two_splits_are_matched_by_name(train, names, test, eval_names, expected):
    arguments = {"names": names, "eval_names": eval_names}
    if expected is None:
        with pytest.raises(DataError, match="1 of 3 classes of split train of memory, the first eel, are not among"):
            numbered(list(train), list(test), **arguments)
    else:
        assert numbered(list(train), list(test), **arguments)[1] == expected


@pytest.mark.parametrize(
    ("train", "test", "options", "words"),
    [
        ([0, None, 1], [0], {}, ["1 of 3 images", "no label", "--label_column"]),
        ([0, 1], [float("nan")], {}, ["1 of 1 images", "no label"]),
        ([0, 1], [-1, -1], {"eval_names": ["a", "b"]}, ["2 of 2 images", "no label"]),
        ([0.37, 1.0], [1], {}, ["label 0.37", "not a class"]),
        ([[0, 1], [1, 0]], [[0, 1]], {}, ["label [0, 1]", "not a class"]),
        ([float("inf"), 1.0], [1], {}, ["label inf", "not a class"]),
        ([4, 4, 4], [4], {}, ["3 images", "only one class (4)", "two or more"]),
        ([0, 1], [0, 5, 6], {}, ["2 of 3 classes", "the first 5", "the 2 of", "more images"]),
        ([0, 1], [0, 1], {"names": ["cat", "dog"], "eval_names": ["cat", "eel"]}, ["1 of 2 classes", "first eel"]),
        ([0, 1], [0, 1], {"names": ["cat", "dog"], "eval_names": ["cat"]}, ["the first 1 (of 1 named classes)"]),
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
