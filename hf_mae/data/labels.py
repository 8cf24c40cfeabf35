"""Labels of any kind -> classes.

Classes are matched by name: `Labels` holds the names of a model's or a training split's classes, and finds a label of
any other split or data set among them. `find_labels` makes them for fine-tuning; `common_classes` and `class_numbers`
number the classes of the two splits that frozen features are evaluated on.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Real
from typing import Any

import numpy as np
import torch

from ..errors import DataError, one_line, public_logger
from ..files import plain_name
from ..keys.finetune_keys import Problem
from .order import Rows
from .shards import Row, Source
from .splits import nfc

logger = public_logger(__name__)

ROWS_AT_ONCE = 256  # their images are in memory at once
SEPARATORS = (";", "|", ",")  # of class names in one text; the first that occurs in a data set is its separator


def mixed_labels(rows: Rows, error: Exception) -> DataError:
    """The error for labels that Arrow can't store in one column."""
    return DataError(f"labels of {rows.name} are of different types ({one_line(error)}); choose a --label_column")


@dataclass(frozen=True)
class Labels:
    """How labels become targets.

    Args:
        problem: one class per image, any number of classes, or numbers.
        names: class names, by index; for regression, one name for each number.
        multi_hot: whether lists of 0 and 1 say which classes an image has, or are numbers of classes; None if that is
            to be told from the labels.
    """

    problem: Problem
    names: tuple[str, ...]
    multi_hot: bool | None = None

    @cached_property
    def _index(self) -> dict[str, int]:
        return {class_name(name): i for i, name in enumerate(self.names)}

    @cached_property
    def _by_number(self) -> dict[int, int]:
        """What a number means without names: the class that is called so, or the index if no class is a number."""
        numbers = {int(name): i for i, name in enumerate(self.names) if re.fullmatch(r"-?[0-9]+", name)}
        return numbers or {i: i for i in range(len(self.names))}

    def name_of(self, value: Any, source: Source) -> str:
        """The name of a label's class, which may not be one of `names`.

        Another split or data set may number its classes differently, so they are matched by name.
        """
        value, names = as_class(value), source.label_names
        if names is not None and isinstance(value, int):
            return class_name(names[value]) if 0 <= value < len(names) else f"{value} (of {len(names)} named classes)"
        name = str(value)
        if name not in self._index and isinstance(value, int) and (found := self._by_number.get(value)) is not None:
            return class_name(self.names[found])
        return name

    def targets(self, values: Sequence[Any], source: Source) -> torch.Tensor:
        """Convert labels of `source` to targets.

        Returns:
            (n,) int64 class indices; (n, classes) float32 of 0 and 1; or (n, numbers) float32.

        Raises:
            DataError: if a label is missing, isn't one of these classes, or isn't a number.
        """
        values = _whole(values, source, self.problem)
        if self.problem == "regression":
            numbers = [_numbers(value, source) for value in values]
            wrong = next((row for row in numbers if len(row) != len(self.names)), None)
            if wrong is not None:
                raise DataError(f"{source.name} has a label of {len(wrong)} numbers, not {len(self.names)}; check it")
            return torch.tensor(numbers, dtype=torch.float32)
        if self.problem == "single_label_classification":
            return torch.tensor([self._find(value, source) for value in values], dtype=torch.int64)
        multi_hot = _is_multi_hot(values, source) and len(values[0]) == len(self.names)
        # With two classes, [0, 1] may also be the numbers of both.
        if multi_hot and (self.multi_hot is not False or len(self.names) > 2):
            return torch.tensor(values, dtype=torch.float32)
        targets = torch.zeros(len(values), len(self.names))
        for row, classes in enumerate(_lists(values, self._index)):
            for value in classes:
                targets[row, self._find(value, source)] = 1
        return targets

    def _find(self, value: Any, source: Source) -> int:
        name = self.name_of(value, source)
        if name not in self._index:
            known = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
            raise DataError(
                f"{source.name}, split {source.split}, has the label {name}, which is not one of the model's "
                f"{len(self.names)} classes ({known}); choose a data set or --label_column with the same names"
            )
        return self._index[name]


def find_labels(rows: Rows, problem: Problem, held_out: Rows | None = None) -> Labels:
    """Find out which classes (or how many numbers) the labels of a data set have; also those of a held-out part.

    Raises:
        DataError: if there are no labels, only one class, or labels that don't fit the problem.
    """
    values = labels_of(rows) + (labels_of(held_out) if held_out else [])
    labels = _labels_among(values, rows.source, problem)
    if len(labels.names) < (2 if problem == "single_label_classification" else 1):
        found = f"only one class ({labels.names[0]})" if labels.names else "no class"
        raise DataError(f"{rows.source.name} has {found}; two or more are needed: check the labels")
    return labels


def _labels_among(values: Sequence[Any], source: Source, problem: Problem) -> Labels:
    values = _whole(values, source, problem)
    if problem == "regression":
        return Labels(problem, tuple(f"LABEL_{i}" for i in range(len(_numbers(values[0], source)))))
    multiple = problem == "multi_label_classification"
    multi_hot = multiple and _is_multi_hot(values, source)
    if multiple:
        values = _lists(values)
    other = next((value for value in values if not (multi_hot or _fits(value, multiple))), None)
    if other is not None:
        parts = other if isinstance(other, list) else [other]
        fitting = "multi_label_classification" if isinstance(other, list) else "single_label_classification"
        fitting = "regression" if any(isinstance(part, float) for part in parts) else fitting
        remedy = "choose another --label_column" if fitting == problem else f"pass --problem_type {fitting}"
        raise DataError(f"{source.name} has the label {str(other)[:50]}, which doesn't fit {problem}; {remedy}")
    if multi_hot:
        return Labels(problem, tuple(str(i) for i in range(len(values[0]))), multi_hot=True)
    names = _class_names([value for row in values for value in row] if multiple else values, source)
    return Labels(problem, names, multi_hot=False)


def leave_out_empty(source: Source, problem: Problem | None) -> None:
    """Take an empty cell of a table of labels for a missing label, unless an image may have any number of classes."""
    labels = source.known_labels()
    if source.unlisted is None or labels is None or problem == "multi_label_classification":
        return
    empty = np.array([isinstance(label, str) and not label.strip() for label in labels])
    if empty.any():
        message = "%s: %d images of split %s have an empty label in %s, and are left out"
        logger.warning(message, source.name, int(empty.sum()), source.split, source.labels_from)
        source.unlisted = source.unlisted | empty


def class_groups(source: Source, problem: Problem) -> np.ndarray:
    """The class of each row, so that a part of each class can be held out.

    A row with several classes belongs to its rarest one, or the first of these. Rows without any class are a group too.

    Returns:
        (n,) int64 class indices, 0 for regression; the number of classes for rows without any; -1 for `unlisted` rows.

    Raises:
        DataError: if a label is missing, or doesn't fit the problem.
    """
    rows = Rows(source, labelled=True)
    groups = np.full(len(source), -1)
    groups[rows.index] = 0
    if problem == "regression":
        return groups
    values = labels_of(rows)
    if source.known_labels() is None:
        source.read_labels = values  # reading them again would read all images again
    targets = _labels_among(values, source, problem).targets(values, source).numpy()
    if targets.ndim == 2:
        counts = targets.sum(axis=0)
        rarest = np.where(targets, counts, np.inf).argmin(axis=1)
        targets = np.where(targets.any(axis=1), rarest, len(counts))
    groups[rows.index] = targets
    return groups


def _class_names(values: Sequence[Any], source: Source) -> tuple[str, ...]:
    """The classes of a source by index: those that it names, else those among its labels, numbers first."""
    if source.label_names:
        return tuple(dict.fromkeys(map(class_name, source.label_names)))
    return tuple(str(value) for value in sorted(set(values), key=lambda value: (isinstance(value, str), value)))


def labels_of(rows: Rows) -> list[Any]:
    """The labels of these rows, in order. Most sources have to read the images too, but don't decode them."""
    labels = rows.source.known_labels()
    if labels is not None:
        return [labels[i] for i in rows.index.tolist()]
    return [row.label for row in each_row(rows)]


def each_row(rows: Rows) -> Iterator[Row]:
    """All rows in order, undecoded; few of them are in memory at once."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield from rows.read(rows.index[start : start + ROWS_AT_ONCE])


def named(label: Any, source: Source) -> Any:
    """A label as anyone can read it: the names of its classes, if `source` has names; None without a label."""
    names = source.label_names
    if isinstance(label, list):
        return [named(part, source) for part in label]
    if names is None or type(label) is not int:
        return class_name(label) if isinstance(label, str) else label
    return class_name(names[label]) if 0 <= label < len(names) else None


@lru_cache(100_000)
def class_name(name: str) -> str:
    """The name of a class as it is compared and written: in one Unicode form, as plain text on one line."""
    return plain_name(nfc(name))


def as_class(label: Any) -> Any:
    """A label as it is compared: whole numbers of any type are integers, and texts are names as by `class_name`."""
    if type(label) is int or isinstance(label, bool):
        return label
    if isinstance(label, str):
        return class_name(label)
    number: Any = label
    return int(number) if isinstance(label, Real) and number % 1 == 0 else label


def _whole(values: Sequence[Any], source: Source, problem: Problem) -> list[Any]:
    """Check that no label is missing; whole numbers that are classes become integers."""
    single = problem == "single_label_classification"  # for several, an empty text means no class
    missing = sum(value is None or (single and is_missing(value, source)) for value in values)
    if missing:
        raise DataError(
            f"{missing} of {len(values)} images of split {source.split} of {source.name} have no label; "
            f"{source.label_remedy}"
        )
    return [as_class(value) for value in values] if single else list(values)


def _fits(value: Any, multiple: bool) -> bool:
    if multiple:
        return isinstance(value, list) and all(isinstance(part, (str, int)) for part in value)
    return isinstance(value, (str, int))


def _lists(values: Sequence[Any], known: dict[str, int] | None = None) -> list[Any]:
    """Texts such as "cat; dog" -> lists of class names; a text that is one of the `known` names is not split."""
    separator = next((one for one in SEPARATORS if any(isinstance(text, str) and one in text for text in values)), None)

    def split(text: str) -> list[str]:
        parts = [text] if separator is None or text in (known or ()) else text.split(separator)
        return [class_name(part.strip()) for part in parts if part.strip()]

    return [split(value) if isinstance(value, str) else value for value in values]


def _is_multi_hot(values: Sequence[Any], source: Source) -> bool:
    """Whether all rows have the same length and hold only 0 and 1; otherwise they are lists of classes."""
    if source.label_names is not None or not all(isinstance(row, list) for row in values):
        return False
    length = len(values[0])
    return length > 1 and all(len(row) == length and all(value in (0, 1) for value in row) for row in values)


def _numbers(value: Any, source: Source) -> list[float]:
    row = value if isinstance(value, list) else [value]
    if isinstance(value, list) and source.label_names:  # columns of 0 and 1 were taken for classes
        row = [float(number in value) for number in range(len(source.label_names))]
    if not row or not all(isinstance(number, (int, float)) and math.isfinite(number) for number in row):
        raise DataError(f"{source.name} has the label {str(value)[:50]}, not a finite number; check the labels")
    return [float(number) for number in row]


# ------------------------------------------------------------------------------------------ frozen features


def has_labels(rows: Rows) -> bool:
    """Whether any of these images may have a label; False only if that is known without reading them."""
    source = rows.source
    if source.labels_from is None:
        return False
    labels = source.known_labels()
    return labels is None or not all(is_missing(labels[i], source) for i in rows.index.tolist())


def is_missing(label: Any, source: Source) -> bool:
    """Whether an image has no label, where each has one class."""
    # In a column of named classes, `datasets` marks a missing label with -1; elsewhere -1 may be a class.
    return label is None or label == "" or label != label or (source.label_names is not None and label == -1)


def check_classes(labels: Sequence[Any], rows: Rows) -> list[Any]:
    """The labels of a split as integers and texts, after a check that each is a class.

    Raises:
        DataError: if an image has no label, or a label that can't be a class.
    """
    values = _whole(labels, rows.source, "single_label_classification")
    odd = next((value for value in values if not isinstance(value, (str, int))), None)
    if odd is not None:
        raise DataError(f"label {str(odd)[:60]} of {rows.name} is not a class; choose another --label_column")
    return values


@dataclass(frozen=True)
class CommonClasses:
    """The classes of a training and an evaluation split: those of `labels` that are used, by name, and their number."""

    labels: Labels
    numbers: dict[str, int]

    def __len__(self) -> int:
        return len(self.numbers)


def common_classes(
    train_labels: Sequence[Any], train_rows: Rows, eval_labels: Sequence[Any], eval_rows: Rows, all_known: bool = True
) -> CommonClasses:
    """Number the classes of a training and an evaluation split, matched by name, from 0.

    Classes that only the evaluation split has are an error if `all_known`; otherwise they come last.

    Raises:
        DataError: if labels are missing, there are fewer than two classes, or the splits' classes differ.
    """
    train_labels, eval_labels = check_classes(train_labels, train_rows), check_classes(eval_labels, eval_rows)
    labels = Labels("single_label_classification", _class_names(train_labels, train_rows.source))
    used = {labels.name_of(label, train_rows.source) for label in set(train_labels)}
    classes = [name for name in labels.names if name in used]
    if len(classes) < 2:
        raise DataError(
            f"{len(train_labels)} images of {train_rows.name} have only one class ({', '.join(used)}); two or more are "
            "needed: use more images, or another --label_column"
        )
    eval_classes = sorted({labels.name_of(label, eval_rows.source) for label in set(eval_labels)})
    unknown = [name for name in eval_classes if name not in used]
    if unknown and all_known:
        raise DataError(
            f"{len(unknown)} of {len(eval_classes)} classes of {eval_rows.name}, the first {unknown[0]}, are not "
            f"among the {len(classes)} of {train_rows.name}; learn from more images, or choose another split"
        )
    return CommonClasses(labels, {name: number for number, name in enumerate([*classes, *unknown])})


def class_numbers(labels: Sequence[Any], source: Source, classes: CommonClasses) -> torch.Tensor:
    """The class number of each label of a source, (n,) int64."""
    return torch.tensor([classes.numbers[classes.labels.name_of(label, source)] for label in labels], dtype=torch.long)
