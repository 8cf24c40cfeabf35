"""Which rows are held out for evaluation, of each class: against the slow obvious way."""

import numpy as np
import pytest
from memory_source import MemorySource, noise_images
from obvious_order import obvious_hash

from hf_mae.data.labels import class_groups, labels_of
from hf_mae.data.order import HELD_OUT, Rows, held_out, held_out_of_each
from hf_mae.data.sources import open_splits
from hf_mae.errors import DataError, UserError
from hf_mae.keys.data_keys import SplitKeys

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


def source_of(labels, sizes=None, names=None) -> MemorySource:
    source = MemorySource(noise_images(sizes or [len(labels)], (1, 1, 1)), labels=labels)
    source.label_names = names
    return source


def obviously_held_out(groups, places, fraction: float) -> list[int]:
    out = []
    for group in set(groups):
        members = sorted(
            (i for i, other in enumerate(groups) if other == group), key=lambda i: obvious_hash(*places[i])
        )
        take = max(round(fraction * len(members)), 1)
        out += members[: min(take, len(members) - 1)]
    return sorted(out)


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.2, 0.5, 0.97])
def test_the_rows_of_each_group_with_the_smallest_hashes_are_held_out(fraction):
    groups = np.random.default_rng(0).permutation(np.repeat([7, -1, 0, 3, 4, 5], [400, 90, 50, 3, 2, 1]))
    places = [(shard, row) for shard, size in enumerate((300, 1, 245)) for row in range(size)]
    out = held_out_of_each(groups, *np.array(places).T, fraction)
    assert np.flatnonzero(out).tolist() == obviously_held_out(groups.tolist(), places, fraction)
    # A smaller part lies within a larger one, so a smaller fraction never evaluates on what was trained on.
    assert not (held_out_of_each(groups, *np.array(places).T, fraction / 2) & ~out).any()


@pytest.mark.parametrize(
    ("rows", "fraction", "expected"),
    [(1, 0.05, 0), (1, 0.9, 0), (2, 0.05, 1), (2, 0.9, 1), (3, 0.05, 1), (3, 0.5, 2), (3, 0.99, 2), (20, 0.05, 1),
     (1000, 0.05, 50)],
)  # fmt: skip
def test_a_class_of_two_or_more_rows_is_trained_on_and_evaluated_on(rows, fraction, expected):
    numbers = np.arange(rows)
    assert held_out_of_each(np.zeros(rows, int), np.zeros(rows, int), numbers, fraction).sum() == expected


def test_a_rare_class_is_in_both_parts_where_a_hash_of_all_rows_may_miss_it():
    labels = ["common"] * 1000 + ["rare"] * 20
    source = source_of(labels)
    groups = class_groups(source, SINGLE)
    train, out = (Rows(source, part, 0.05, groups=groups) for part in ("train", "held_out"))
    assert np.bincount(groups[out.index]).tolist() == [50, 1]
    assert sorted([*train.index, *out.index]) == list(range(1020))
    # Nearly the rows that pretraining holds out.
    plain = np.flatnonzero(held_out(*out.place(np.arange(1020)), 0.05))
    assert len(set(plain) & set(out.index)) >= 40
    few = Rows(source, "held_out", 0.05, max_samples=10, groups=groups)
    assert len(few) == 10
    assert set(few.index) <= set(out.index)


def test_rows_of_several_classes_belong_to_their_rarest_one():
    lists = [["a", "b"], ["a"], ["b", "a"], [], ["c", "a"], ["c", "b"], ["a"], []]  # a 5, b 3, c 2
    expected = [1, 0, 1, 3, 2, 2, 0, 3]
    rows_of_bits = [[name in row for name in "abc"] for row in lists]
    for labels in (lists, [";".join(row) for row in lists], np.array(rows_of_bits).astype(int).tolist()):
        assert class_groups(source_of(labels), MULTI).tolist() == expected
    assert class_groups(source_of([["b", "a"], ["a"], ["b"]]), MULTI).tolist() == [0, 0, 1]  # the first of equals


def test_the_groups_of_one_class_an_image_are_the_classes_and_one_class_will_do():
    assert class_groups(source_of([2, 0, 2], names=["x", "y", "z"]), SINGLE).tolist() == [2, 0, 2]
    assert class_groups(source_of(["b", "a", "b"]), SINGLE).tolist() == [1, 0, 1]
    assert class_groups(source_of(["b", "b"]), SINGLE).tolist() == [0, 0]
    with pytest.raises(DataError, match="1 of 2 images of split train of memory have no label"):
        class_groups(source_of(["b", None]), SINGLE)


def test_rows_that_a_table_does_not_list_are_in_no_class():
    labels = ["a", None, "b", "a", None, "b", "b"]
    source = source_of(labels)
    source.unlisted = np.array([label is None for label in labels])
    groups = class_groups(source, SINGLE)
    assert groups.tolist() == [0, -1, 1, 0, -1, 1, 1]
    train, out = (Rows(source, part, 0.3, labelled=True, groups=groups) for part in ("train", "held_out"))
    places = [(0, row) for row in range(7)]
    unlisted = {1, 4}
    assert out.index.tolist() == sorted(set(obviously_held_out(groups.tolist(), places, 0.3)) - unlisted)
    assert sorted([*train.index, *out.index]) == [0, 2, 3, 5, 6]


def test_labels_are_read_once():
    source = source_of([0, 1, 1, 0], sizes=[3, 1])
    groups = class_groups(source, SINGLE)
    read = sorted((shard, row) for shard, rows in source.reads for row in rows)
    assert read == [(0, 0), (0, 1), (0, 2), (1, 0)]
    rows = Rows(source, "train", groups=groups)
    assert labels_of(rows) == [[0, 1, 1, 0][i] for i in rows.index]
    assert len(read) == sum(len(rows) for _, rows in source.reads)


# ------------------------------------------------------------------------------------------ the keys


def test_the_fraction_is_of_all_rows_without_classes_and_of_each_class_with_them():
    keys = SplitKeys(dataset="digits", eval_fraction=0.2)
    rows, eval_rows, evaluated_on = open_splits(keys)
    assert evaluated_on == "20% of train, held out by a hash of each row's place"
    numbers = np.arange(1797)
    assert eval_rows.index.tolist() == np.flatnonzero(held_out(np.zeros(1797, int), numbers, 0.2)).tolist()
    of_numbers = open_splits(keys, problem="regression")
    assert of_numbers[2] == evaluated_on
    assert len(of_numbers[1]) == round(0.2 * 1797)
    rows, eval_rows, evaluated_on = open_splits(keys, problem=SINGLE)
    assert evaluated_on == "20% of each class of train, held out by a hash of each row's place"
    whole = np.bincount(labels_of(Rows(rows.source)))
    assert np.bincount(labels_of(eval_rows)).tolist() == np.rint(whole * 0.2).tolist()
    by_default = open_splits(SplitKeys(dataset="digits"), problem=SINGLE)
    assert HELD_OUT == 0.05
    assert by_default[2] == "5% of each class of train, held out by a hash of each row's place"
    assert set(by_default[1].index) < set(eval_rows.index)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_fraction_outside_of_zero_to_one_is_refused(fraction):
    with pytest.raises(UserError, match=r"^eval_fraction \S+ lies outside \(0, 1\); give e.g. 0.2$"):
        SplitKeys(dataset="digits", eval_fraction=fraction)


@pytest.mark.parametrize(("key", "shown"), [("eval_split", "test"), ("eval_dataset", "https://host/test.parquet")])
def test_a_fraction_beside_other_images_to_evaluate_on_is_refused(key, shown):
    given = shown.replace("//", "//me:secret@")
    with pytest.raises(
        UserError, match=f"^eval_fraction 0.2 holds out .* but {key} is {shown}; leave out one of them$"
    ):
        SplitKeys(dataset="digits", eval_fraction=0.2, **{key: given})


def test_a_fraction_that_leaves_no_row_on_one_side_gets_one_line():
    message = "digits has 1797 rows, too few to train on some and evaluate on others with eval_fraction 0.9999999; give"
    with pytest.raises(DataError, match=f"{message} more data, another --eval_fraction or an --eval_dataset"):
        open_splits(SplitKeys(dataset="digits", eval_fraction=0.9999999))
    source = source_of(["a", "b", "c"])
    with pytest.raises(DataError, match=r"3 rows, too few .* with eval_fraction 0\.05; give more data"):
        Rows(source, "held_out", groups=class_groups(source, SINGLE))
