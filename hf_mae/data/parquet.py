"""Rows of tables: Arrow tables mapped from the local disk, and parquet files read in place.

`find_columns` chooses the image and label columns of either. A parquet file is read one row group at a time, or in
parts of `BLOCK_BYTES` if it is larger, and a corrupt row group loses only its own rows. A mapped table is checked once,
when it is opened. Import this module only when there is a table: datasets and pyarrow belong to an extra.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.table import embed_table_storage

from ..errors import DataError, nearest, one_line, public_logger
from .decode import BadImage
from .place import LABEL_NAMES, Place
from .remote import READ_AHEAD, is_remote, open_bytes, reading
from .shards import BlockSource, Row, Source, in_threads

logger = public_logger(__name__)

BLOCK_BYTES = 128 * 2**20  # in memory; a reader keeps a block, and a stream copies its images
NUMBER_BYTES = 8  # of a number in nested lists, with its share of the lists' offsets


def find_columns(features: datasets.Features, place: Place) -> tuple[str, str | None, list[str] | None]:
    """Choose the image and label columns: by name if the user gave one, else by type.

    Without a name, the image column is the only one of type Image, else the only binary one, else the only one of
    nested numbers. The label column is the only ClassLabel (or list of them), or one with a usual name; there
    may be none.

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
        of_one = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        classes = of_one or [name for name, feature in features.items() if class_names(feature)]
        usual = [name for name in LABEL_NAMES if name in (classes or features)]
        label_column = classes[0] if len(classes) == 1 else (usual[0] if usual else None)
    names = class_names(features[label_column]) if label_column else None
    return image_column or best[0], label_column, names


def class_names(feature: Any) -> list[str] | None:
    """The names of a column of classes, one or a list of them in each row; None for any other column."""
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) and feature.names else None


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


def image_of(value: Any, shared: dict[Any, Any]) -> bytes | np.ndarray | BadImage:
    """The image in a cell of an image column (a `pyarrow.Scalar`), in the form of `Row.image`; `shared`: `_content`."""
    if isinstance(value, pa.ExtensionScalar):
        value = value.value
    if isinstance(value, pa.StructScalar) and value.is_valid:
        value = value["bytes"]
    if isinstance(value, pa.ListScalar) and value.is_valid:
        return _nested_array(value)
    content = None if value is None else _content(value, shared)
    if isinstance(content, bytes):
        return content
    # Don't follow a path in the data: data from elsewhere must not be able to open local files.
    return BadImage("the row has no image bytes (if it has a path, it is not followed)", "NoBytes")


def _content(value: Any, shared: dict[Any, Any]) -> Any:
    """The value in a cell. Cells with the same entry of a dictionary get one object, which is kept in `shared`."""
    if not isinstance(value, pa.DictionaryScalar) or not value.is_valid:
        return value.as_py()
    place = value.dictionary.buffers()[-1].address, value.index.as_py()
    if place not in shared:
        shared[place] = value.as_py()
    return shared[place]


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
        self.labels_from = self._label and f"column {self._label}"
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
        return [self._row(shard, row, image_of(images[i], {}), labels[i]) for i, row in enumerate(rows)]

    def known_labels(self) -> list[Any]:
        column = self._label
        return self._table.select_columns(column)[:][column].to_pylist() if column else [None] * len(self)


class ParquetSource(BlockSource):
    """Parquet files of a split, read in place, one row group or part of one at a time."""

    def __init__(self, place: Place, split: str):
        footers = in_threads(_read_footer, place.splits[split])
        self._groups = [edges for _, edges, _ in footers]  # of each file: the first row of every row group, and the end
        super().__init__(place, split, self._groups)
        self._metadata = [metadata for metadata, _, _ in footers]
        self.file_sizes = [size for _, _, size in footers]
        schemas = [metadata.schema.to_arrow_schema() for metadata in self._metadata]
        declared = place.builder.info.features if place.builder else None
        features = declared or declared_features(schemas[0], self.shard_names[0])
        self._image, self._label, self.label_names = find_columns(features, place)
        self.labels_from = self._label and f"column {self._label}"
        self._columns = [self._image, self._label] if self._label else [self._image]
        for column in self._columns:
            for schema, shard_name in zip(schemas, self.shard_names, strict=True):
                if column not in schema.names:
                    message = f"{shard_name} has no column {column!r}, which other files of {place.name} have"
                    raise DataError(f"{message}; leave this file out")
        self._cut(list(map(self._block_edges, range(len(footers)))))

    def _block_edges(self, shard: int) -> list[int]:
        """The first row of every block, a row group or an equal part of a large one; then the number of all rows."""
        edges: list[int] = []
        for group, (start, stop) in enumerate(itertools.pairwise(self._groups[shard])):
            size = max(BLOCK_BYTES, _bytes_of(self._metadata[shard], group, self._columns))
            edges += range(start, stop, max(1, (stop - start) * BLOCK_BYTES // size))
        return [*edges, self._groups[shard][-1]]

    def read(self, shard: int, rows: Sequence[int]) -> list[Row]:
        result = []
        shared: dict[Any, Any] = {}
        for row in rows:
            start, table = self._block(shard, row)
            image, label = table, None
            if not isinstance(table, BadImage):
                image = image_of(table[self._image][row - start], shared)
                label = _content(table[self._label][row - start], shared) if self._label else None
            result.append(self._row(shard, row, image, label))
        return result

    def _read_block(self, shard: int, number: int) -> tuple[int, Any]:
        """A block's first row, and its table or, if its row group is corrupt, a `BadImage` for all its rows."""
        start, stop = self._edges[shard][number : number + 2]
        table = self._read_rows(shard, start, stop)
        if isinstance(table, BadImage) and is_remote(self._urls[shard]):
            table = self._read_rows(shard, start, stop)  # the transfer may have been at fault
        if isinstance(table, BadImage):
            logger.warning("%s; its rows are skipped and counted as bad", table)
        return start, table

    def _read_rows(self, shard: int, start: int, stop: int) -> Any:
        """The table of a block."""
        edges, metadata = self._edges[shard], self._metadata[shard]
        group = bisect_right(self._groups[shard], start) - 1
        first, last = self._groups[shard][group : group + 2]
        whole = (start, stop) == (first, last)
        with reading(self._urls[shard]), open_bytes(self._urls[shard]) as file:
            try:
                parquet = pq.ParquetFile(
                    file,
                    metadata=metadata,
                    pre_buffer=whole,  # joins the column chunks into one request, and keeps them in memory
                    buffer_size=0 if whole else READ_AHEAD,
                    read_dictionary=_with_dictionary(metadata, self._columns),
                    page_checksum_verification=True,
                )
                # No threads, because workers may be forked.
                if whole:
                    table = parquet.read_row_group(group, columns=self._columns, use_threads=False)
                else:
                    size = edges[bisect_right(edges, first)] - first
                    parts = parquet.iter_batches(size, row_groups=[group], columns=self._columns, use_threads=False)
                    part = next(itertools.islice(parts, (start - first) // size, None), None)
                    table = pa.Table.from_batches([] if part is None else [part], parquet.schema_arrow)
                table.validate(full=True)  # finds text that is not UTF-8 before a label is read
                if len(table) != stop - start:
                    raise pa.ArrowInvalid(f"it holds {len(table)} rows")
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk's fault; without an errno, the bytes were read, but are corrupt
                message = f"row group {group} of {self.shard_names[shard]} is corrupt ({one_line(error)})"
                return BadImage(message, "CorruptRowGroup")
        return table


# ------------------------------------------------------------------------------------------ footers and sizes


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


def declared_features(schema: Any, shard_name: str) -> Any:
    """The `datasets.Features` of an Arrow schema."""
    try:
        return datasets.Features.from_arrow_schema(schema)
    except Exception as error:  # corrupt JSON can raise anything
        message = f"the column types in {shard_name} are corrupt ({one_line(error)})"
        raise DataError(f"{message}; fetch it again or leave it out") from error


def _leaves(metadata: Any, columns: Sequence[str] | None = None) -> list[tuple[int, Any]]:
    """The columns of a file by number, as its schema describes them; nested columns have several parts."""
    leaves = ((number, metadata.schema.column(number)) for number in range(metadata.num_columns))
    return [leaf for leaf in leaves if columns is None or leaf[1].path.split(".", 1)[0] in columns]


def _bytes_of(metadata: Any, group: int, columns: Sequence[str] | None = None) -> int:
    """Bytes of a row group's columns in memory, with each value of a dictionary once; for a small group, at most."""
    leaves, of_group = _leaves(metadata, columns), metadata.row_group(group)
    numbers = [leaf for _, leaf in leaves if not leaf.physical_type.endswith("BYTE_ARRAY")]
    if not any(leaf.max_repetition_level for leaf in numbers):
        most = of_group.total_byte_size + len(numbers) * of_group.num_rows * NUMBER_BYTES
        if 0 <= most <= BLOCK_BYTES:
            return most
    # A corrupt description of a column ends the process (pyarrow 24), so it is asked for only where it matters.
    chunks = [of_group.column(number) for number, _ in leaves]
    counts = (0 if chunk.physical_type.endswith("BYTE_ARRAY") else chunk.num_values for chunk in chunks)
    sizes = (chunk.total_uncompressed_size for chunk in chunks)
    return sum(max(size, count * NUMBER_BYTES) for size, count in zip(sizes, counts, strict=True))


def _with_dictionary(metadata: Any, columns: Sequence[str] | None = None) -> list[str]:
    """The columns to read as a dictionary and indices: it may have a few large values for many rows."""
    return [leaf.path for _, leaf in _leaves(metadata, columns) if leaf.physical_type == "BYTE_ARRAY"]


def largest_table(urls: Sequence[str]) -> tuple[int, int]:
    """How large the table of parquet files may be without compression: bytes of all rows, and of a row at most.

    Each row may have the longest value of its row group's dictionary.
    """
    total = longest = 0
    for url in urls:
        metadata, edges, _ = _read_footer(url)
        for group, (start, stop) in enumerate(itertools.pairwise(edges)):
            size, rows = _bytes_of(metadata, group), stop - start
            if rows * size > BLOCK_BYTES and (columns := _with_dictionary(metadata)):
                size += rows * sum(_longest_values(url, group, columns))
            total, longest = total + size, max(longest, size // max(rows, 1))
    return total, longest


def _longest_values(url: str, group: int, columns: list[str]) -> list[int]:
    """Bytes of the longest value in each dictionary of a row group; none if it is corrupt, which its reader reports."""
    with reading(url), open_bytes(url) as file:
        try:
            parquet = pq.ParquetFile(file, read_dictionary=columns, buffer_size=READ_AHEAD)
            first = next(parquet.iter_batches(1, row_groups=[group], columns=columns, use_threads=False))
        except pa.ArrowException:
            return []
    lengths = [
        pc.call_function("binary_length", [values]) for array in first.columns for values in _dictionaries(array)
    ]
    return [pc.call_function("max", [numbers]).as_py() or 0 for numbers in lengths]


def _dictionaries(array: Any) -> Iterator[Any]:
    if isinstance(array, pa.DictionaryArray):
        yield array.dictionary
    parts = array.flatten() if isinstance(array, pa.StructArray) else []
    parts = [array.values] if isinstance(array, (pa.ListArray, pa.LargeListArray)) else parts
    for part in parts:
        yield from _dictionaries(part)
