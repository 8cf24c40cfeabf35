"""Labels from a table: a `metadata.csv` in a folder of images, as `datasets` reads it, or a list that lies elsewhere.

`attach` finds the row of each image and the columns that hold its label. Everything after it reads labels as if they
came from class folders or a label column.
"""

import hashlib
import json
import logging
import os
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError, nearest
from ..files import local_path, missing_path
from .kinds import METADATA_FILES
from .listing import shown
from .place import LABEL_NAMES, Place
from .remote import is_remote
from .splits import folder_of, nfc
from .tables import TABLES, Table

logger = logging.getLogger(__name__)

FILE_NAME = "file_name"  # the column that `datasets` expects
PROBE = 1000  # rows by which the column of file names is found
FEW = 0.5  # another column that names more than this share of the images makes the choice ambiguous


@dataclass
class FileLabels:
    """The labels of a split's images.

    Attributes:
        values: one label per image, see `Row.label`; None for an image without a row.
        names: class names by index, if labels are indices.
        origin: the table and its columns of labels; None if it isn't clear which these are.
        remedy: what to do about images without a label.
        digest: changes if a label changes.
    """

    values: list[Any]
    names: list[str] | None
    origin: str | None
    remedy: str
    digest: str

    @property
    def unlisted(self) -> np.ndarray:
        """Which images have no label, (n,) bool."""
        return np.array([value is None for value in self.values])


def attach(place: Place, split: str) -> FileLabels | None:
    """The labels that tables give the images of a split; None if there is no table for them.

    Raises:
        DataError: if a table can't be read, names none of the images, or doesn't say which columns are labels.
    """
    if "label tables" not in place.cache:
        place.cache["label tables"] = _find(place)
    found = place.cache["label tables"]
    return None if found is None else _labels(found, place, split, place.splits[split])


@dataclass
class _Found:
    """Rows that belong to images; `choices` says what to do if no column is that of the labels."""

    parts: list[tuple[str, Table, list[str], list[tuple[str, int]]]]  # place, table, label columns, (image, row)
    missing: int  # rows without an image
    choices: str

    def name(self, images: list[str]) -> str:
        """The place of the table that lists any of these images, or of all tables if none does."""
        wanted = set(images)
        listing = [place for place, _, _, rows in self.parts if any(image in wanted for image, _ in rows)]
        first, *more = listing or [place for place, *_ in self.parts]
        return f"{first} and {len(more)} more" if more else first


def _find(place: Place) -> _Found | None:
    """Read the tables, and match their rows with the images of all splits; None if there is no table for them."""
    names = [name for files in place.splits.values() for name in files]
    if place.labels is None:
        tables = _metadata(place)
        return _listed(place, tables, set(names)) if tables else None
    path = local_path(place.labels)
    if not is_remote(path) and not os.path.isfile(path):
        missing = None if os.path.exists(path) else missing_path(path, TABLES)
        raise DataError(missing or f"{place.labels} is not a file that can be read; check --labels")
    table = Table(path)
    file_column, numbers = _find_images(table, names, place)
    label_columns, choices = _label_columns(table, file_column, place.label_column)
    if not label_columns:
        raise DataError(f"{place.labels} has no single column of labels; {choices}")
    rows = [(names[number], row) for row, number in enumerate(numbers) if number is not None]
    return _Found([(table.name, table, label_columns, rows)], table.rows - len(rows), "")


def _labels(found: _Found, place: Place, split: str, wanted: list[str]) -> FileLabels:
    name, labels = found.name(wanted), dict[str, list[Any]]()
    class_names: list[str] | None = None
    used: dict[str, None] = {}
    for _, table, columns, rows in found.parts:
        if not columns:
            continue
        used |= dict.fromkeys(columns)
        values, names = _values(table, columns)
        if class_names is not None and names != class_names:
            raise DataError(f"{place.name} has other classes in {table.name} than in its other tables; use one table")
        class_names = names
        for image, row in rows:
            given = labels.setdefault(image, [])
            if values[row] is not None and values[row] not in given:
                given.append(values[row])
    several = any(len(given) > 1 for given in labels.values())  # a row for each finding
    if several and len(used) > 1:
        image = next(image for image, given in labels.items() if len(given) > 1)
        raise DataError(f"{name} has several rows with different labels for {shown(image)}; keep one of them")
    values = [_whole(labels.get(image, []), several) for image in wanted]
    remedy = found.choices or f"write them into {name}"
    origin = None if found.choices else f"{name}, column {', '.join(used)}"
    result = FileLabels(values, class_names, origin, remedy, _digest(values, class_names))
    _report(found, place, split, wanted, result)
    return result


def _whole(given: list[Any], several: bool) -> Any:
    """An image's label from those of its rows; a list if other images have several."""
    if not given or not several:
        return given[0] if given else None
    return list(dict.fromkeys(part for label in given for part in (label if isinstance(label, list) else [label])))


def _digest(values: list[Any], names: list[str] | None) -> str:
    return hashlib.sha256(json.dumps([values, names], default=str).encode()).hexdigest()


def _report(found: _Found, place: Place, split: str, wanted: list[str], result: FileLabels) -> None:
    """Warn if it isn't clear which column has the labels, or if images and rows don't match."""
    if found.choices:
        message = "%s: no image has a label, as it isn't clear which column of %s has them: %s"
        logger.warning(message, place.name, found.name(wanted), found.choices)
        return
    without = [name for name, value in zip(wanted, result.values, strict=True) if value is None]
    line = f"{len(wanted) - len(without)} of {len(wanted)} images of split {split} have a label"
    if without:
        line += f" (the first without one is {shown(without[0])})"
    if found.missing:
        line += f"; {found.missing} {'rows name' if found.missing > 1 else 'row names'} no image"
    if without or found.missing:
        logger.warning("%s: labels are from %s: %s", place.name, result.origin, line)


# ------------------------------------------------------------------------------------------ metadata.csv


def _metadata(place: Place) -> dict[str, Table]:
    """Folder -> its table. Tables without file names are something else."""
    tables: dict[str, Table] = {}
    for name in sorted(place.metadata, key=lambda name: METADATA_FILES.index(posixpath.basename(name))):
        if folder_of(name) in tables:
            logger.warning("%s: %s is not read, as %s is", place.name, name, tables[folder_of(name)].name)
            continue
        table = Table(f"{place.root}/{name}")
        if FILE_NAME in table.columns:
            tables[folder_of(name)] = table
        else:
            logger.warning("%s: %s has no column %s, and is not read", place.name, name, FILE_NAME)
    return tables


def _listed(place: Place, tables: dict[str, Table], names: set[str]) -> _Found | None:
    known = {nfc(name): name for name in names}
    parts, missing, hints, nearer = [], 0, [], set()
    for folder in sorted(tables, key=lambda folder: -folder.count("/") - bool(folder)):  # the nearest table counts
        table = tables[folder]
        columns, hint = _label_columns(table, FILE_NAME, place.label_column, repeated=True)
        hints.append(hint)
        rows = []
        for row, value in enumerate(table.columns[FILE_NAME]):
            image = known.get(posixpath.normpath(posixpath.join(nfc(folder), _path(value))))
            missing += image is None
            if image is not None and image not in nearer:
                rows.append((image, row))
        nearer |= {image for image, _ in rows}
        parts.append((posixpath.join(folder, table.name), table, columns, rows))
    hint = "" if "" in hints else next((one for one in hints if one != _NOTHING_ELSE), _NOTHING_ELSE)
    if hint == _NOTHING_ELSE:
        return None  # lists of files alone
    return _Found(parts, missing, f"{hint}, or rename it to read class folders" if hint else "")


# ------------------------------------------------------------------------------------------ --labels


def _path(value: Any) -> str:
    """A cell of a column of file names as a path."""
    return nfc(str(value).replace("\\", "/")).removeprefix("./")


def _name(path: str) -> str:
    return posixpath.basename(path)


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def _find_images(table: Table, names: list[str], place: Place) -> tuple[str, list[int | None]]:
    """The column of file names, and for each row the number of its image.

    Values may be paths relative to the folder, file names, or names without their ending.
    """
    step = max(1, table.rows // PROBE)
    columns = [FILE_NAME] if FILE_NAME in table.columns else list(table.columns)
    ranked: list[tuple[int, int, str]] = []
    for level, of_image in enumerate((str, _name, _stem)):
        index = _index(names, of_image)
        for column in columns:
            values = table.columns[column][::step]
            found = {_number(value, index, level) for value in values} - {None}
            ranked.append((-len(found), level, column))
    ranked.sort()
    count, level, column = ranked[0]
    if not count:
        first = next((str(value) for value in table.columns[columns[0]] if value), "")
        raise DataError(
            f"no column of {table.name} ({', '.join(columns)}) names images of {place.name}: it has e.g. {first[:50]}, "
            f"the folder {shown(names[0])}; check that it is the list of these images"
        )
    others = [name for hits, at, name in ranked[1:] if at == level and hits < FEW * count]
    if others:
        raise DataError(
            f"several columns of {table.name} name images of {place.name}: {', '.join([column, *others])}; rename the "
            f"right one to {FILE_NAME}"
        )
    index = _index(names, (str, _name, _stem)[level])
    if _number(column, index, level) is not None:
        raise DataError(f"{table.name} has the image {column[:80]} in place of a column's name; add a line of names")
    numbers = [_number(value, index, level) for value in table.columns[column]]
    for row, number in enumerate(numbers):
        if number == _SEVERAL:
            value = str(table.columns[column][row])
            raise DataError(f"{table.name} names {value[:80]}, which is several images; write paths below the folder")
    return column, numbers


_SEVERAL = -1


def _index(names: Sequence[str], of_image: Callable[[str], str]) -> dict[str, int]:
    index: dict[str, int] = {}
    for number, name in enumerate(names):
        key = nfc(of_image(name))
        index[key] = _SEVERAL if key in index else number
    return index


def _number(value: Any, index: dict[str, int], level: int) -> int | None:
    if not isinstance(value, (str, int)):
        return None
    path = _path(value)
    if level == 0:
        return index.get(path)
    found = index.get(_name(path))
    return index.get(_stem(path)) if found is None and level == 2 else found


# ------------------------------------------------------------------------------------------ label columns

_NOTHING_ELSE = "it has no other column"


def _label_columns(table: Table, file_column: str, chosen: str | None, repeated: bool = False) -> tuple[list[str], str]:
    """The columns of labels, or none and what to do: the chosen ones, else one with a usual name, else the only one.

    `repeated`: the only column holds labels only if most of its values occur again; captions don't.
    """
    others = [name for name, values in table.columns.items() if name != file_column and _may_be_label(values)]
    if chosen is not None:
        columns = [chosen] if chosen in table.columns else [name.strip() for name in chosen.split(",")]
        for name in columns:
            if name not in table.columns:
                hint = nearest(name, others) or ";"
                message = f"{table.name} has no column {name!r} for --label_column{hint} its columns"
                raise DataError(f"{message}: {', '.join(others)}")
        return columns, ""
    usual = [name for name in LABEL_NAMES if name in others]
    only = len(others) == 1 and (not repeated or 2 * len(set(map(str, table.columns[others[0]]))) <= table.rows)
    if usual or only:
        return (usual or others)[:1], ""
    return [], f"choose one or more with --label_column: {','.join(others)}" if others else _NOTHING_ELSE


def _may_be_label(values: list[Any]) -> bool:
    first = next((value for value in values if value not in (None, [])), None)
    return not isinstance(first[0] if isinstance(first, list) else first, (dict, list, bytes))


def _values(table: Table, columns: list[str]) -> tuple[list[Any], list[str] | None]:
    """The label of each row, and class names if labels are indices.

    Several columns of 0 and 1 are classes: a row's label is the list of those that have a 1. Several columns of other
    numbers are the numbers of a regression.
    """
    typed = [table.typed(column) for column in columns]
    if len(columns) == 1:
        return typed[0], table.class_names.get(columns[0])
    typed = [[None if value == "" else value for value in values] for values in typed]
    for column, values in zip(columns, typed, strict=True):
        text = next((value for value in values if not (value is None or isinstance(value, (int, float)))), None)
        if text is not None:
            raise DataError(f"column {column} of {table.name} holds {str(text)[:50]}, not 0 or 1; choose others")
    given = {value for values in typed for value in values}
    if given <= {0, 1}:
        return [[i for i, value in enumerate(row) if value] for row in zip(*typed, strict=True)], columns
    if given <= {0, 1, -1, None}:
        column, values = next((c, v) for c, v in zip(columns, typed, strict=True) if not set(v) <= {0, 1})
        odd = next(value for value in values if value not in (0, 1))
        cell = "an empty cell" if odd is None else odd
        raise DataError(f"column {column} of {table.name} has {cell}; write 0 or 1 into each, or leave out the rows")
    numbers = [None if None in row else list(map(float, row)) for row in zip(*typed, strict=True)]
    return numbers, None
