"""Labels of any kind -> classes.

Fine-tuning (`Labels`, `find_labels`) stores the names of the classes in the model, and matches other data sets to them
by name. Evaluating frozen features (`common_classes`, `class_numbers`) only numbers the classes of two splits of one
data set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from numbers import Real
from typing import Any

import torch

from ..errors import DataError, one_line
from ..keys.finetune_keys import Problem
from .order import Rows
from .shards import Source

LABELS_AT_ONCE = 256  # rows; all their images are in memory at once


def mixed_labels(rows: Rows, error: Exception) -> DataError:
    """The error for labels that Arrow can't store in one column."""
    return DataError(f"labels of {rows.name} are of different types ({one_line(error)}); choose a --label_column")


@dataclass(frozen=True)
class Labels:
    """How labels become targets.

    Args:
        problem: one class per image, any number of classes, or numbers.
        names: class names, by index; for regression, one name for each number.
    """

    problem: Problem
    names: tuple[str, ...]

    def targets(self, values: Sequence[Any], source: Source) -> torch.Tensor:
        """Convert labels of `source` to targets.

        Returns:
            (n,) int64 class indices; (n, classes) float32 of 0 and 1; or (n, numbers) float32.

        Raises:
            DataError: if a label is missing, isn't one of these classes, or isn't a number.
        """
        values = _whole(values, source)
        if self.problem == "regression":
            numbers = [_numbers(value, source) for value in values]
            wrong = next((row for row in numbers if len(row) != len(self.names)), None)
            if wrong is not None:
                raise DataError(f"{source.name} has a label of {len(wrong)} numbers, not {len(self.names)}; check it")
            return torch.tensor(numbers, dtype=torch.float32)
        index = {name: i for i, name in enumerate(self.names)}
        if self.problem == "single_label_classification":
            return torch.tensor([_find(value, index, source) for value in values], dtype=torch.int64)
        if _is_multi_hot(values) and len(values[0]) == len(self.names):
            return torch.tensor(values, dtype=torch.float32)
        targets = torch.zeros(len(values), len(self.names))
        for row, classes in enumerate(values):
            for value in classes:
                targets[row, _find(value, index, source)] = 1
        return targets


def find_labels(rows: Rows, problem: Problem) -> Labels:
    """Find out which classes (or how many numbers) the labels of a data set have.

    Raises:
        DataError: if there are no labels, only one class, or labels that don't fit the problem.
    """
    source = rows.source
    values = _whole(labels_of(rows), source)
    if problem == "regression":
        return Labels(problem, tuple(f"LABEL_{i}" for i in range(len(_numbers(values[0], source)))))
    multiple = problem == "multi_label_classification"
    other = next((value for value in values if isinstance(value, list) != multiple or isinstance(value, float)), None)
    if other is not None:
        fitting = "regression" if isinstance(other, float) else "single_label_classification"
        fitting = "multi_label_classification" if isinstance(other, list) else fitting
        raise DataError(
            f"{source.name} has the label {str(other)[:50]}, which doesn't fit {problem}; pass --problem_type {fitting}"
        )
    if source.label_names:
        names = source.label_names
    elif multiple and _is_multi_hot(values):
        names = [str(i) for i in range(len(values[0]))]
    else:
        classes = {value for row in values for value in row} if multiple else set(values)
        # Numbers are sorted as numbers, mixed types by their names.
        key = None if len({type(value) for value in classes}) == 1 else str
        names = [str(value) for value in sorted(classes, key=key)]
    if len(names) < 2 and not multiple:
        raise DataError(f"{source.name} has only one class ({names[0]}); two or more are needed: check the labels")
    return Labels(problem, tuple(names))


def labels_of(rows: Rows) -> list[Any]:
    """The labels of these rows, in order. Most sources have to read the images too, but don't decode them."""
    labels = rows.source.known_labels()
    if labels is not None:
        return [labels[i] for i in rows.index.tolist()]
    parts = (rows.index[start : start + LABELS_AT_ONCE] for start in range(0, len(rows), LABELS_AT_ONCE))
    return [row.label for part in parts for row in rows.read(part)]


def _whole(values: Sequence[Any], source: Source) -> Sequence[Any]:
    missing = sum(value is None for value in values)
    if missing:
        raise DataError(
            f"{missing} of {len(values)} images of {source.name}, split {source.split}, have no label; sort images "
            "into one folder per class, name the column with --label_column, or choose another split"
        )
    return values


def _find(value: Any, index: dict[str, int], source: Source) -> int:
    """Find a label's class by name, because another split or data set may number its classes differently."""
    names, name = source.label_names, str(value)
    if names and isinstance(value, int):
        name = names[value] if 0 <= value < len(names) else f"{value} (of {len(names)} named classes)"
    elif type(value) is int and 0 <= value < len(index) and not any(known.lstrip("-").isdigit() for known in index):
        return value  # without names, numbers are the model's class indices
    if name not in index:
        known = ", ".join(list(index)[:8]) + (", ..." if len(index) > 8 else "")
        raise DataError(
            f"{source.name}, split {source.split}, has the label {name}, which is not one of the model's {len(index)} "
            f"classes ({known}); choose a data set or --label_column with the same names"
        )
    return index[name]


def _is_multi_hot(values: Sequence[Any]) -> bool:
    """Whether all rows have the same length and hold only 0 and 1; otherwise they are lists of classes."""
    length = len(values[0])
    return length > 1 and all(len(row) == length and all(value in (0, 1) for value in row) for row in values)


def _numbers(value: Any, source: Source) -> list[float]:
    row = value if isinstance(value, list) else [value]
    if not row or not all(isinstance(number, (int, float)) and math.isfinite(number) for number in row):
        raise DataError(f"{source.name} has the label {str(value)[:50]}, not a finite number; check the labels")
    return [float(number) for number in row]


def find_classes(labels: Sequence[Any], rows: Rows) -> list[int | str]:
    """The distinct classes among a split's labels, sorted; class numbers may have gaps.

    Raises:
        DataError: if an image has no label, or a label that can't be a class.
    """
    classes: set[int | str] = set()
    missing = 0
    named = rows.source.label_names is not None
    for label in labels:
        # In a column of named classes, `datasets` marks a missing label with -1; elsewhere -1 may be a class.
        if label is None or label != label or (named and label == -1):
            missing += 1
        elif isinstance(label, str) or (isinstance(label, Real) and label % 1 == 0):
            classes.add(as_class(label))
        else:
            raise DataError(f"label {str(label)[:60]} of {rows.name} is not a class; choose another --label_column")
    if missing:
        raise DataError(
            f"{missing} of {len(labels)} images of {rows.name} have no label; name their column with --label_column, "
            "or choose a split that has labels"
        )
    return sorted(classes, key=lambda label: (isinstance(label, str), label))


def as_class(label: Any) -> int | str:
    """A label that is a class: a word, or a whole number of any type."""
    return label if isinstance(label, str) else int(label)


def common_classes(
    train_labels: Sequence[Any], train_rows: Rows, eval_labels: Sequence[Any], eval_rows: Rows, all_known: bool = True
) -> dict[int | str, int]:
    """Number the classes of a training and an evaluation split: class -> number, from 0.

    Classes that only the evaluation split has are an error if `all_known`; otherwise they come last.

    Raises:
        DataError: if labels are missing, there are fewer than two classes, or the splits' classes differ.
    """
    names, eval_names = train_rows.source.label_names, eval_rows.source.label_names
    if names and eval_names:
        for number, (name, other) in enumerate(zip_longest(names, eval_names)):
            if name != other:
                raise DataError(
                    f"class {number} is {name!r} in {train_rows.name} and {other!r} in {eval_rows.name}; choose splits "
                    "with the same classes"
                )
    classes, eval_classes = find_classes(train_labels, train_rows), find_classes(eval_labels, eval_rows)
    if len(classes) < 2:
        raise DataError(
            f"{len(train_labels)} images of {train_rows.name} have only one class ({classes[0]}); two or more are "
            "needed: use more images, or another --label_column"
        )
    unknown = [label for label in eval_classes if label not in set(classes)]
    if unknown and all_known:
        raise DataError(
            f"{len(unknown)} of {len(eval_classes)} classes of {eval_rows.name}, the first {unknown[0]!r}, are not "
            f"among the {len(classes)} of {train_rows.name}; learn from more images, or choose another split"
        )
    return {label: number for number, label in enumerate([*classes, *unknown])}


def class_numbers(labels: Sequence[Any], classes: dict[int | str, int]) -> torch.Tensor:
    """The class number of each label, (n,) int64."""
    return torch.tensor([classes[as_class(label)] for label in labels], dtype=torch.long)
