"""Tars of images (webdataset): an index made from the headers, then samples by offset and size.

Member names are untrusted. They group members into samples and tell image from label, and are never used as paths.
"""

import hashlib
import io
import json
import logging
import tarfile
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import DataError
from ..files import write_bytes
from .decode import BadImage
from .locate import IMAGE_EXTENSIONS
from .remote import is_remote, one_line, open_bytes, with_retries
from .shards import Row, Source, in_threads

logger = logging.getLogger(__name__)

BLOCK_SAMPLES = 256
BLOCK_BYTES = 64 * 2**20  # a block of a remote tar is one request, and is kept in memory
INDEX_CACHE_SECONDS = 1.0  # an index that took longer is kept on disk: to make one means to read the whole tar
# Columns of an index (n, 5), int64. A sample without label has label offset -1. A tar that ends early has one row more,
# of image size -1, for all that is missing.
_IMAGE, _IMAGE_SIZE, _LABEL, _LABEL_SIZE, _LABEL_IS_JSON = range(5)

Members = dict[str, tuple[int, int]]  # what follows the first dot of a name -> offset and size in bytes


class TarSource(Source):
    """Samples of uncompressed tars, a shard each: neighbouring members that share the name up to its first dot.

    Args:
        name: what the user typed.
        split: name of the split.
        urls: all local paths, or all URLs.
        names: for people, in the same order.
        image_column: what follows the first dot in the image's member name, or None for its only image extension.
        label_column: the same of a member with the label as text, else a key in the sample's `.json`; None for
            `.cls`, else the key "label".

    Raises:
        DataError: if a tar cannot be read, no sample has an image, or one has several and none is chosen.
    """

    def __init__(
        self,
        name: str,
        split: str,
        urls: list[str],
        names: list[str],
        image_column: str | None,
        label_column: str | None,
    ):
        self._urls, self._label_key = urls, label_column or "label"
        self._indices = in_threads(lambda url: _load_index(url, image_column, label_column), urls)
        remote = is_remote(urls[0])
        sizes = [len(index) for index in self._indices]
        if image_column and not sum(sizes):
            raise DataError(f"no sample of {name} has a member .{image_column}; choose another --image_column")
        super().__init__(name, split, names, sizes, random_access=not remote)
        if remote:
            self.blocks = [(i, *block) for i, index in enumerate(self._indices) for block in _blocks(index)]
        self._starts: list[list[int]] = [[] for _ in urls]
        for shard, start, _ in self.blocks:
            self._starts[shard].append(start)
        self._last: tuple[tuple[int, int, int], tuple[int, bytes]] | None = None
        if label_column:
            self._check_label(label_column)

    def read(self, shard: int, rows: Sequence[int]) -> list[Row]:
        if self.random_access:
            with open_bytes(self._urls[shard]) as file:
                return [self._sample(shard, row, file) for row in rows]
        return [self._sample(shard, row, None) for row in rows]

    def _check_label(self, label_column: str) -> None:
        shard = next(shard for shard, size in enumerate(self.shard_sizes) if size)
        if self.read(shard, [0])[0].label is None:
            message = f"the first sample of {self.name} has no member .{label_column} and no such key in its .json"
            raise DataError(f"{message}; choose another --label_column")

    def _sample(self, shard: int, row: int, file: BinaryIO | None) -> Row:
        place = self._indices[shard][row].tolist()
        if place[_IMAGE_SIZE] < 0:
            return self._row(shard, row, BadImage(f"{self.shard_names[shard]} ends early", "TruncatedTar"), None)
        image = self._bytes(shard, row, place[_IMAGE], place[_IMAGE_SIZE], file)
        label = None
        if place[_LABEL] >= 0:
            text = self._bytes(shard, row, place[_LABEL], place[_LABEL_SIZE], file)
            label = _parse_label(text, self._label_key if place[_LABEL_IS_JSON] else None)
        return self._row(shard, row, image, label)

    def _bytes(self, shard: int, row: int, offset: int, size: int, file: BinaryIO | None) -> bytes:
        if file is None:
            start, content = self._block(shard, row)
            return content[offset - start : offset - start + size]
        file.seek(offset)
        content = file.read(size)
        if len(content) != size:
            raise DataError(f"{self._urls[shard]} has become shorter since the start of the run; restore the file")
        return content

    def _block(self, shard: int, row: int) -> tuple[int, bytes]:
        """Offset and bytes of the block that holds a row, the last one from memory."""
        at = bisect_right(self._starts[shard], row) - 1
        start, stop = [*self._starts[shard], self.shard_sizes[shard]][at : at + 2]
        if self._last is None or self._last[0] != (shard, start, stop):
            self._last = None  # frees the memory of one before the next is fetched
            starts, ends = _extents(self._indices[shard][start:stop])
            first = int(starts.min())
            with open_bytes(self._urls[shard]) as remote:
                remote.seek(first)
                self._last = (shard, start, stop), (first, remote.read(int(ends.max()) - first))
        return self._last[1]


def _extents(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of every sample's first byte, and of the one after its last."""
    starts = np.where(index[:, _LABEL] < 0, index[:, _IMAGE], np.minimum(index[:, _IMAGE], index[:, _LABEL]))
    ends = np.maximum(index[:, _IMAGE] + index[:, _IMAGE_SIZE], index[:, _LABEL] + index[:, _LABEL_SIZE])
    return starts, ends


def _blocks(index: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of samples that are not too many and not too large."""
    first_bytes, end_bytes = (offsets.tolist() for offsets in _extents(index))
    start = 0
    for row in range(1, len(index)):
        if row - start == BLOCK_SAMPLES or end_bytes[row] - first_bytes[start] > BLOCK_BYTES:
            yield start, row
            start = row
    if len(index):
        yield start, len(index)


def _parse_label(text: bytes, key: str | None) -> Any:
    """The label in a member, as a number where it is one; None if it cannot be read."""
    try:
        if key is not None:
            return json.loads(text)[key]
        word = text.decode().strip()
        return int(word) if word.lstrip("+-").isdecimal() else word
    except (ValueError, KeyError, TypeError):
        return None


def _load_index(url: str, image_column: str | None, label_column: str | None) -> np.ndarray:
    """The index of a tar, from the cache where making it is slow."""
    cached = _cache_path(url, image_column, label_column)
    if cached is not None and cached.exists():
        try:
            return np.load(cached, allow_pickle=False)
        except (ValueError, OSError, EOFError):
            pass  # half written or from another time: made again below
    started = time.monotonic()
    index = _make_index(url, image_column, label_column)
    if cached is not None and time.monotonic() - started > INDEX_CACHE_SECONDS:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            np.save(content, index)
            write_bytes(cached, content.getbuffer())
        except OSError as error:
            logger.warning("the index of %s is not kept (%s)", url, one_line(error))
    return index


def _cache_path(url: str, *columns: str | None) -> Path | None:
    """Where the index of this version of a remote file is kept; None if nothing tells its versions apart."""
    if not is_remote(url):
        return None
    import fsspec
    from datasets import config

    fs, path = fsspec.core.url_to_fs(url)
    if "hf" in fs.protocol:
        version = url  # it has the commit in it
    else:
        info = with_retries(lambda: fs.info(path), url)
        version = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime") if info.get(key)), None)
    if version is None:
        return None
    digest = hashlib.sha256(repr((url, str(version), columns)).encode()).hexdigest()
    return Path(config.HF_DATASETS_CACHE) / "hf_mae_tar_indices" / f"{digest}.npy"


def _make_index(url: str, image_column: str | None, label_column: str | None) -> np.ndarray:
    """Read a tar's headers.

    Returns:
        (n, 5) int64: image offset and size, label offset (-1: none) and size in bytes, 1 where the label is JSON.
    """
    places = []
    with open_bytes(url, read_ahead=True) as file:
        for members in _samples(file, url):
            if members is None:
                # At the place of the sample before, so that their block is no larger for it.
                places.append((places[-1][_IMAGE] if places else 0, -1, -1, 0, 0))
                continue
            if image_column is not None:
                images = [image_column.lower()] if image_column.lower() in members else []
            else:
                images = [field for field in members if f".{field}".endswith(IMAGE_EXTENSIONS)]
            if len(images) > 1:
                names = ", ".join(sorted(images))
                raise DataError(f"{url} has several images a sample ({names}); choose one with --image_column NAME")
            if not images:
                continue
            field = (label_column or "cls").lower()
            field = field if field in members and field not in images else "json"
            places.append((*members[images[0]], *members.get(field, (-1, 0)), field == "json"))
    return np.array(places, dtype=np.int64).reshape(-1, 5)


def _samples(file: BinaryIO, url: str) -> Iterator[Members | None]:
    """Groups of neighbouring members with one name; None, at the end, for what is missing of a tar that ends early."""
    end = file.seek(0, 2)
    file.seek(0)
    sample: Members = {}
    current: str | None = None
    fields: set[str] = set()  # of the sample before
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (it owns nothing: `file` is closed by its opener)
    except tarfile.TarError as error:
        message = f"{url} is not an uncompressed tar ({one_line(error)}); unpack, or fetch it again"
        raise DataError(message) from error
    for member in _members(tar):
        folder, slash, file_name = member.name.rpartition("/")
        base, dot, field = file_name.partition(".")
        if not (base and dot and member.isreg()) or member.issparse() or member.offset_data + member.size > end:
            continue
        if folder + slash + base != current or field.lower() in sample:
            if sample:
                yield sample
                fields = set(sample)
            sample, current = {}, folder + slash + base
        sample[field.lower()] = (member.offset_data, member.size)
    file.seek(tar.offset)
    whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    if sample and (whole or not fields or set(sample) == fields):
        yield sample
    if not whole:
        logger.warning("%s ends early, in the middle of a sample or without its end mark; fetch it again", url)
        yield None


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while True:
        try:
            member = tar.next()
        except DataError:
            raise
        except (tarfile.TarError, ValueError):  # cut or corrupt; the caller sees that no end mark follows
            return
        if member is None:
            return
        tar.members = []  # type: ignore[misc]  # it would keep a record of every member
        yield member
