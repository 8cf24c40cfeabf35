"""Tables that people keep beside their images: .csv, .tsv, .jsonl and .parquet files, read as columns."""

import csv
import io
import json
import math
import posixpath
import re
from typing import Any

from ..errors import DataError, one_line
from .place import without_query
from .remote import open_bytes, reading

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
_MISSING = ("", "na", "n/a", "nan", "null")
_NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)(\.\d*)?([eE][-+]?\d+)?|[-+]?\.\d+")  # 007 is a name


class Table:
    """The columns of a table, each with a value per row, and the class names of those that have them."""

    def __init__(self, url: str):
        """Read a table.

        Raises:
            DataError: if the file can't be read, or isn't a table.
        """
        self.name = posixpath.basename(without_query(url))
        self.columns: dict[str, list[Any]] = {}
        self.class_names: dict[str, list[str]] = {}
        ending = posixpath.splitext(without_query(url))[1].lower()
        if ending not in TABLES:
            raise DataError(f"{url} is not a table that can be read; save it as CSV, or as {', '.join(TABLES[1:])}")
        with open_bytes(url) as file, reading(url):
            content = file.read()
        try:
            if ending == ".parquet":
                self._read_parquet(content)
            elif ending == ".jsonl":
                self._read_lines(_decoded(content, url))
            else:
                self._read_csv(_decoded(content, url), "\t" if ending == ".tsv" else None)
        except (ValueError, RecursionError, csv.Error) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"cannot read {url}: {one_line(error)}; check the file") from error
        self.rows = len(next(iter(self.columns.values()), []))
        if not self.rows:
            raise DataError(f"{url} has no rows; check the file")

    def typed(self, column: str) -> list[Any]:
        """A column's values; the texts of a CSV file become numbers or booleans if all of them are."""
        values = self.columns[column]
        return _typed(values) if self._texts else values

    def _read_csv(self, text: str, delimiter: str | None) -> None:
        self._texts = True
        header = text.split("\n", 1)[0]
        delimiter = delimiter or max(",;\t", key=header.count)
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        names = [name.strip() for name in next(lines, [])]
        if len(set(names)) < len(names):
            raise DataError(f"{self.name} has several columns of one name in its first line: {header.strip()[:80]}")
        rows = []
        for row in lines:
            if len(row) > len(names):
                what = f"line {lines.line_num} of {self.name} has {len(row)} fields, but the first has {len(names)}"
                raise DataError(f"{what}; put texts that hold a {delimiter!r} in quotes")
            if any(row):
                rows.append([cell.strip() for cell in row] + [""] * (len(names) - len(row)))
        self.columns = {name: [row[i] for row in rows] for i, name in enumerate(names) if name}

    def _read_lines(self, text: str) -> None:
        self._texts = False
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{self.name} has a line that is not an object such as {{...}}; check the file")
        names = dict.fromkeys(name for row in rows for name in row)
        self.columns = {name: [row.get(name) for row in rows] for name in names}

    def _read_parquet(self, content: bytes) -> None:
        self._texts = False
        import pyarrow as pa
        import pyarrow.parquet as pq

        from .parquet import class_names, declared_features

        try:
            table = pq.read_table(pa.BufferReader(content))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(one_line(error)) from error
        features = declared_features(table.schema, self.name)
        self.columns = {name: table[name].to_pylist() for name in table.column_names}
        self.class_names = {name: names for name in self.columns if (names := class_names(features[name]))}


def _decoded(content: bytes, url: str) -> str:
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{url} is not UTF-8 text ({one_line(error)}); save it as CSV UTF-8") from error


def _typed(texts: list[str]) -> list[Any]:
    given = {text for text in texts if text.lower() not in _MISSING}
    if given and all(text.lower() in ("true", "false") for text in given):
        values: dict[str, Any] = {text: text.lower() == "true" for text in given}
    elif given and all(_NUMBER.fullmatch(text) for text in given):
        whole = all(re.fullmatch(r"[-+]?\d+", text) for text in given)
        values = {text: int(text) if whole else float(text) for text in given}
        if not all(math.isfinite(value) for value in values.values()):
            return texts
    else:
        return texts
    return [values.get(text) for text in texts]
