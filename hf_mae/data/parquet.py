"""Rows of tables: Arrow tables mapped from the local disk, and parquet files read in place.

`find_columns` chooses the image and label columns of either. A parquet file is read one row group at a time, and a
corrupt row group loses only its own rows. A mapped table is checked once, when it is opened. Import this module only
when there is a table: datasets and pyarrow belong to an extra.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.table import embed_table_storage

from ..errors import DataError, nearest, one_line
from .decode import BadImage
from .place import Place
from .remote import is_remote, open_bytes, reading
from .shards import BlockSource, Row, Source, in_threads

logger = logging.getLogger(__name__)

LABEL_NAMES = ("label", "labels", "fine_label", "cls")


def find_columns(features: datasets.Features, place: Place) -> tuple[str, str | None, list[str] | None]:
    """Choose the image and label columns: by name if the user gave one, else by type.

    Without a name, the image column is the only one of type Image, else the only binary one, else the only one of
    nested numbers. The label column is the only ClassLabel, or one with a usual name; there may be none.

    Returns:
        The image column, the label column and the class names; None for each that is missing.

    Raises:
        DataError: if a named column doesn't exist or can't hold images, or if several columns fit.
    """
    image_column, label_column = place.image_column, place.label_column
    for flag, name in (("--image_column", image_column), ("--label_column", label_column)):
        if name is not None and name not in features:
            hint = nearest(name, features) or ";"
            raise DataError(f"{place.name} has no column {name!r} for {flag}{hint} its columns: {', '.join(features)}")
    ranks = {name: rank for name, feature in features.items() if (rank := _image_rank(feature)) is not None}
    best = [name for name, rank in ranks.items() if rank == min(ranks.values())]
    if image_column is not None and image_column not in ranks:
        message = f"column {image_column!r} of {place.name} holds {features[image_column]}, which is not an image"
        raise DataError(f"{message}; choose another --image_column of {', '.join(features)}")
    if image_column is None and len(best) != 1:
        candidates = f"several columns of images ({', '.join(best)})" if best else "no column of images"
        raise DataError(
            f"{place.name} has {candidates} among {', '.join(features)}; choose one with --image_column NAME"
        )
    if label_column is None:
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        usual = [name for name in LABEL_NAMES if name in (classes or features)]
        label_column = classes[0] if len(classes) == 1 else (usual[0] if usual else None)
    label = features.get(label_column) if label_column else None
    names = list(label.names) if isinstance(label, datasets.ClassLabel) and label.names else None
    return image_column or best[0], label_column, names


def _image_rank(feature: Any) -> int | None:
    """0 for images, 1 for bytes, 2 for nested numbers; None for a column that can't hold images."""
    if isinstance(feature, datasets.Image):
        return 0
    if isinstance(feature, dict):
        return 1 if "bytes" in feature else None
    if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
        return 2
    depth = 0
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature, depth = feature.feature, depth + 1
    if not isinstance(feature, datasets.Value):
        return None
    if depth == 0:
        return 1 if "binary" in feature.dtype else None
    return 2 if depth in (2, 3) and feature.dtype.startswith(("int", "uint", "float")) else None


def image_of(value: Any) -> bytes | np.ndarray | BadImage:
    """The image in a cell of an image column (a `pyarrow.Scalar`), in the form of `Row.image`."""
    if isinstance(value, pa.ExtensionScalar):
        value = value.value
    if isinstance(value, pa.StructScalar) and value.is_valid:
        value = value["bytes"]
    if isinstance(value, pa.ListScalar) and value.is_valid:
        return _nested_array(value)
    content = None if value is None else value.as_py()
    if isinstance(content, bytes):
        return content
    # Don't follow a path in the data: data from elsewhere must not be able to open local files.
    return BadImage("the row has no image bytes (if it has a path, it is not followed)", "NoBytes")


def _nested_array(value: Any) -> np.ndarray | BadImage:
    """Convert nested Arrow lists of equal lengths to an array with the numbers' dtype."""
    values = value.values
    shape = [len(values)]
    while isinstance(values, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        lengths = pc.call_function("list_value_length", [values]).unique()
        if len(lengths) != 1 or not lengths[0].is_valid:
            return BadImage("the row's lists have different lengths", "RaggedArray")
        shape.append(lengths[0].as_py())
        values = values.flatten()
    if values.null_count:
        return BadImage("the row's lists have missing values", "RaggedArray")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


class ArrowSource(Source):
    """A `datasets.Dataset` on the local disk, mapped into memory: one shard.

    `follow_paths`: rows may hold file paths instead of bytes, and these files are read. Use it only for tables that
    `datasets` itself built from files that it found.

    Raises:
        DataError: if the table is corrupt.
    """

    def __init__(self, place: Place, split: str, dataset: Any, follow_paths: bool = False):
        super().__init__(place.name, split, [split], [len(dataset)], random_access=True)
        self._image, self._label, self.label_names = find_columns(dataset.features, place)
        columns = [self._image, self._label] if self._label else [self._image]
        self._table, self._follow_paths = dataset.select_columns(columns).with_format("arrow"), follow_paths
        try:
            # Arrow trusts a mapped file: one flipped bit in an offset ends the process when it reads the row. This
            # check reads all offsets and texts, but no images.
            self._table.data.table.validate(full=True)
        except pa.ArrowException as error:
            raise DataError(f"the table of {place.name} is corrupt ({one_line(error)}); create it again") from error

    def read(self, shard: int, rows: Sequence[int]) -> list[Row]:
        if not rows:
            return []
        table = self._table[list(rows)]
        if self._follow_paths:
            with reading(self.name):
                table = embed_table_storage(table)
        images = table[self._image]
        labels = table[self._label].to_pylist() if self._label else [None] * len(rows)
        return [self._row(shard, row, image_of(images[i]), labels[i]) for i, row in enumerate(rows)]

    def known_labels(self) -> list[Any]:
        column = self._label
        return self._table.select_columns(column)[:][column].to_pylist() if column else [None] * len(self)


class ParquetSource(BlockSource):
    """Parquet files of a split, read in place, one row group at a time."""

    def __init__(self, place: Place, split: str):
        footers = in_threads(_read_footer, place.splits[split])
        super().__init__(place, split, [edges for _, edges, _ in footers])
        self._metadata = [metadata for metadata, _, _ in footers]
        self.file_sizes = [size for _, _, size in footers]
        schemas = [metadata.schema.to_arrow_schema() for metadata in self._metadata]
        declared = place.builder.info.features if place.builder else None
        features = declared or _declared_features(schemas[0], self.shard_names[0])
        self._image, self._label, self.label_names = find_columns(features, place)
        self._columns = [self._image, self._label] if self._label else [self._image]
        for column in self._columns:
            for schema, shard_name in zip(schemas, self.shard_names, strict=True):
                if column not in schema.names:
                    message = f"{shard_name} has no column {column!r}, which other files of {place.name} have"
                    raise DataError(f"{message}; leave this file out")

    def read(self, shard: int, rows: Sequence[int]) -> list[Row]:
        result = []
        for row in rows:
            start, table = self._block(shard, row)
            image, label = table, None
            if not isinstance(table, BadImage):
                image = image_of(table[self._image][row - start])
                label = table[self._label][row - start].as_py() if self._label else None
            result.append(self._row(shard, row, image, label))
        return result

    def _read_block(self, shard: int, number: int) -> tuple[int, Any]:
        """A row group's first row, and its table or, if it is corrupt, a `BadImage` for all its rows."""
        table = self._read_row_group(shard, number)
        if isinstance(table, BadImage) and is_remote(self._urls[shard]):
            table = self._read_row_group(shard, number)  # the transfer may have been at fault
        if isinstance(table, BadImage):
            logger.warning("%s; its rows are skipped and counted as bad", table)
        return self._edges[shard][number], table

    def _read_row_group(self, shard: int, group: int) -> Any:
        with reading(self._urls[shard]), open_bytes(self._urls[shard]) as file:
            try:
                # pre_buffer joins the column chunks into one request; no threads, because workers may be forked.
                parquet = pq.ParquetFile(
                    file, metadata=self._metadata[shard], pre_buffer=True, page_checksum_verification=True
                )
                table = parquet.read_row_group(group, columns=self._columns, use_threads=False)
                table.validate(full=True)  # finds text that is not UTF-8 before a label is read
                if len(table) != self._metadata[shard].row_group(group).num_rows:
                    raise pa.ArrowInvalid(f"it holds {len(table)} rows")
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk's fault; without an errno, the bytes were read, but are corrupt
                message = f"row group {group} of {self.shard_names[shard]} is corrupt ({one_line(error)})"
                return BadImage(message, "CorruptRowGroup")
        return table


def _read_footer(url: str) -> tuple[Any, list[int], int]:
    """A parquet file's metadata; the first row of each row group, then the number of all rows; the size in bytes."""
    with open_bytes(url) as file:
        try:
            metadata = pq.ParquetFile(file).metadata
            sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
            edges = list(itertools.accumulate(sizes, initial=0))
            if edges[-1] != metadata.num_rows:
                raise ValueError(f"its row groups have {edges[-1]} rows, not {metadata.num_rows}")
            return metadata, edges, file.seek(0, 2)
        except DataError:
            raise
        except Exception as error:  # corrupt names and types can raise anything
            message = f"{url} is not a complete parquet file ({one_line(error)}); fetch it again or leave it out"
            raise DataError(message) from error


def _declared_features(schema: Any, shard_name: str) -> Any:
    try:
        return datasets.Features.from_arrow_schema(schema)
    except Exception as error:  # corrupt JSON can raise anything
        message = f"the column types in {shard_name} are corrupt ({one_line(error)})"
        raise DataError(f"{message}; fetch it again or leave it out") from error
