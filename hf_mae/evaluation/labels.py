"""Labels as a source has them -> class numbers, or one line that says what is wrong with them."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from numbers import Real
from typing import Any

import torch

from ..data.sources import DataError
from ..data.stream import Rows


def read_labels(rows: Rows) -> Iterator[Any]:
    """The labels of all rows, in their order; images are read along and not decoded."""
    for start in range(0, len(rows), 1024):
        for row in rows.read(rows.index[start : start + 1024]):
            yield row.label


def find_classes(labels: Sequence[Any], rows: Rows) -> list[int | str]:
    """The classes of a split, in a fixed order; gaps between their numbers don't matter.

    Args:
        labels: of images of the split.
        rows: of the split.

    Raises:
        DataError: if an image has no label, or one that is no class.
    """
    found: set[int | str] = set()
    without = 0
    named = rows.source.label_names is not None
    for label in labels:
        # datasets' mark for "no label" in a column of named classes is -1; elsewhere it may be a class.
        if label is None or label != label or (named and label == -1):
            without += 1
        elif isinstance(label, str) or (isinstance(label, Real) and label % 1 == 0):
            found.add(as_class(label))
        else:
            raise DataError(f"label {str(label)[:60]} of {rows.name} is no class; name another --label_column")
    if without:
        raise DataError(
            f"{without} of {len(labels)} images of {rows.name} have no label; name their column by --label_column, "
            "or take a split that has labels"
        )
    return sorted(found, key=lambda label: (isinstance(label, str), label))


def as_class(label: Any) -> int | str:
    """A label that is a class: a word, or a whole number of any type."""
    return label if isinstance(label, str) else int(label)


def common_classes(
    train_labels: Sequence[Any], train_rows: Rows, eval_labels: Sequence[Any], eval_rows: Rows, all_known: bool = True
) -> dict[int | str, int]:
    """Class -> its number from 0, of a split to learn from and one to classify.

    Args:
        train_labels: to learn from.
        train_rows: where they are from.
        eval_labels: to classify.
        eval_rows: where they are from.
        all_known: classes that can't be learnt are an error; otherwise they come last.

    Raises:
        DataError: if labels are missing, there are fewer than two classes, or the splits' classes differ.
    """
    names, eval_names = train_rows.source.label_names, eval_rows.source.label_names
    if names and eval_names:
        for number, (name, other) in enumerate(zip_longest(names, eval_names)):
            if name != other:
                raise DataError(
                    f"class {number} is {name!r} in {train_rows.name} and {other!r} in {eval_rows.name}; give splits "
                    "of the same classes"
                )
    classes, eval_classes = find_classes(train_labels, train_rows), find_classes(eval_labels, eval_rows)
    if len(classes) < 2:
        raise DataError(
            f"{len(train_labels)} images of {train_rows.name} have one class only ({classes[0]}); two or more are "
            "needed: take more images, or another --label_column"
        )
    unknown = [label for label in eval_classes if label not in set(classes)]
    if unknown and all_known:
        raise DataError(
            f"{len(unknown)} of {len(eval_classes)} classes of {eval_rows.name}, the first {unknown[0]!r}, are not "
            f"among the {len(classes)} of {train_rows.name}; learn from more images, or from another split"
        )
    return {label: number for number, label in enumerate([*classes, *unknown])}


def class_numbers(labels: Sequence[Any], classes: dict[int | str, int]) -> torch.Tensor:
    """(n,) int64 numbers of labels."""
    return torch.tensor([classes[as_class(label)] for label in labels], dtype=torch.long)


def top_k_correct(scores: torch.Tensor, labels: torch.Tensor, k: int) -> int:
    """How many rows have their label among the k classes of highest score.

    Args:
        scores: (n, K), e.g. logits.
        labels: (n,) class numbers.
        k: all classes where there are fewer.
    """
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return int((best == labels.to(best.device).unsqueeze(1)).sum())
