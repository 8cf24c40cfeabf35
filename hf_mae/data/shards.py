"""`Source`, the base class of all readers of undecoded rows, and the readers of arrays and of image files.

Tables are read in parquet.py, tars in tars.py. Readers don't keep files open between calls, only names, sizes and
offsets. So each can be pickled to a spawned worker or used after a fork, and two processes never share a file position.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
import numpy as np

from ..errors import DataError
from ..files import plain_name
from .decode import BadImage
from .place import Place, short_names, without_query
from .remote import is_remote, open_bytes, read_whole, reading

FILES_BLOCK = 64  # remote image files
LABEL_REMEDY = (
    "sort images into one folder per class, name the column with --label_column, or choose a split that has labels"
)
THREADS = 16  # maximum number of requests at the same time
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Row:
    """An undecoded sample and its place in the source.

    Attributes:
        shard: index into `Source.shard_names`.
        row: row number inside that shard, from 0.
        key: readable place: `train-00000-of-00008.parquet#17`, or a file's path relative to its folder; plain text on
            one line, see `plain_name`, without the query of a URL.
        image: the encoded file's bytes, or an array; or, if the source can't give the image, a `BadImage` that says
            why. `decode_image` accepts all three, and raises the last.
        label: class index if there are classes, else the value of the label column; None without a label.
    """

    shard: int
    row: int
    key: str
    image: bytes | np.ndarray | BadImage
    label: Any = None


class Source:
    """Rows by place. Subclasses read them; all attributes are set when the constructor returns.

    Attributes:
        name: what the user typed, without secrets.
        split: name of the split.
        shard_names: readable names of the shards, unique.
        shard_sizes: number of rows in each shard.
        random_access: True if any row is cheap to read, as on a local disk; False if blocks should be read in order.
        blocks: (shard, start, stop) in order; together they cover every row once.
        label_names: class names by index; None if they are unknown. A label may be a list of such indices.
        labels_from: where labels come from, such as "class folders"; None if the source has no labels.
        label_remedy: what a user can do if images have no label.
        unlisted: which rows have no label in a table that has those of others, (n,) bool; None without such a table.
        splits_from: as `Place.splits_from`.
        read_labels: the labels of all rows, in order, once someone has read them; None before.
        fingerprint: values that can be stored as JSON and differ if the data differs; no absolute paths, no secrets.
    """

    def __init__(self, name: str, split: str, shard_names: list[str], shard_sizes: list[int], random_access: bool):
        if not sum(shard_sizes):
            raise DataError(f"{name}: split {split!r} has no rows; check the files")
        self.name, self.split, self.random_access = name, split, random_access
        self.shard_names, self.shard_sizes = shard_names, shard_sizes
        self.blocks = [(shard, 0, size) for shard, size in enumerate(shard_sizes) if size]
        self.label_names: list[str] | None = None
        self.labels_from: str | None = None
        self.label_remedy = LABEL_REMEDY
        self.unlisted: np.ndarray | None = None
        self.splits_from: str | None = None
        self.read_labels: list[Any] | None = None
        self.fingerprint: dict[str, Any] = {}

    def __len__(self) -> int:
        """Number of rows in all shards."""
        return sum(self.shard_sizes)

    def read(self, shard: int, rows: Sequence[int]) -> list[Row]:
        """Rows of one shard, in the order of `rows`, their numbers in it.

        Without random access, ask for rows of one block at a time, so that it is fetched only once.

        Raises:
            SourceUnavailable: if the network failed on every try.
            DataError: if a file no longer exists, or can't be read.
        """
        raise NotImplementedError

    def known_labels(self) -> list[Any] | None:
        """The labels of all rows, in order; None if they can only be found by reading the rows."""
        return self.read_labels

    def _row(self, shard: int, row: int, image: bytes | np.ndarray | BadImage, label: Any) -> Row:
        return Row(shard, row, f"{self.shard_names[shard]}#{row}", image, label)


class ArraySource(Source):
    """Images in memory, (n, H, W, C), and their labels (n,); one shard."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, label_names: list[str]):
        super().__init__(name, "train", [name], [len(images)], random_access=True)
        self._images, self._labels, self.label_names = images, labels, label_names
        self.fingerprint = {"kind": name, "split": "train", "rows": self.shard_sizes}

    def read(self, shard: int, rows: Sequence[int]) -> list[Row]:
        return [self._row(shard, row, self._images[row], int(self._labels[row])) for row in rows]


class FileSource(Source):
    """One image per file, one shard: `names` are paths relative to `place.root`, `labels` their (n,) labels."""

    def __init__(self, place: Place, split: str, names: list[str], labels: np.ndarray | list[Any] | None):
        super().__init__(place.name, split, [split], [len(names)], random_access=not is_remote(place.root))
        self._root, self._names, self._labels = place.root.rstrip("/"), names, labels
        self._start = len(f"{self._root}/")  # of a file's name in its URL
        if not self.random_access:
            self.blocks = _blocks([[*range(0, len(names), FILES_BLOCK), len(names)]])

    def read(self, shard: int, rows: Sequence[int]) -> list[Row]:
        urls = [f"{self._root}/{self._names[row]}" for row in rows]
        if self.random_access:
            images = [_read_local(url) for url in urls]
        else:
            fs, _ = fsspec.core.url_to_fs(self._root)
            images = in_threads(lambda url: read_whole(fs, url), urls)
        return [
            Row(shard, row, self._key(row), image, self._label(row)) for row, image in zip(rows, images, strict=True)
        ]

    def _key(self, row: int) -> str:
        return plain_name(without_query(f"{self._root}/{self._names[row]}")[self._start :])

    def _label(self, row: int) -> Any:
        label = None if self._labels is None else self._labels[row]
        return int(label) if isinstance(label, np.integer) else label

    def known_labels(self) -> list[Any]:
        return [self._label(row) for row in range(len(self))]


def _read_local(path: str) -> bytes:
    with open_bytes(path) as file, reading(path):
        return file.read()


class BlockSource(Source):
    """Rows of files that can be read one block at a time. Each file is a shard; the last block is kept in memory.

    `edges` has, for each shard, the first row of every block and, at the end, the number of all rows.
    """

    def __init__(self, place: Place, split: str, edges: list[list[int]], random_access: bool = False):
        self._urls = place.splits[split]
        super().__init__(place.name, split, short_names(self._urls), [rows[-1] for rows in edges], random_access)
        self._last: tuple[tuple[int, int], Any] | None = None
        self._cut(edges)

    def _cut(self, edges: list[list[int]]) -> None:
        """Read these blocks from now on."""
        self._edges, self.blocks = edges, _blocks(edges)

    def __getstate__(self) -> dict[str, Any]:
        # Don't send the block in memory to a worker: it is cheaper to read again.
        return self.__dict__ | {"_last": None}

    def _block(self, shard: int, row: int) -> Any:
        """The result of `_read_block` for the block of a row."""
        place = shard, bisect_right(self._edges[shard], row) - 1
        if self._last is None or self._last[0] != place:
            self._last = None  # frees a block's memory before the next is fetched
            self._last = place, self._read_block(*place)
        return self._last[1]

    def _read_block(self, shard: int, number: int) -> Any:
        raise NotImplementedError


def _blocks(edges: list[list[int]]) -> list[tuple[int, int, int]]:
    """(shard, start, stop) of the blocks between these edges, without empty ones."""
    pairs = ((shard, *pair) for shard, rows in enumerate(edges) for pair in itertools.pairwise(rows))
    return [(shard, start, stop) for shard, start, stop in pairs if stop > start]


def in_threads(call: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """`[call(item) for item in items]`, several at a time."""
    if len(items) < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(THREADS, len(items))) as pool:
        return list(pool.map(call, items))
