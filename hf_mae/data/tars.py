"""Tars of images (webdataset): an index is built from the headers, then samples are read by offset and size.

Member names are untrusted. They group members into samples and tell image from label, and are never used as paths.
"""

import hashlib
import json
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np

from ..errors import DataError, one_line, public_logger
from ..files import as_utf8, replaced
from .decode import BadImage
from .kinds import IMAGE_EXTENSIONS, PACKED, Endings
from .place import Place
from .remote import is_remote, open_bytes, reading, with_retries
from .shards import BlockSource, Row, in_threads

logger = public_logger(__name__)

BLOCK_SAMPLES = 256
JSON_PROBED = 16  # samples whose .json is looked at for a label
BLOCK_BYTES = 64 * 2**20  # a block of a remote tar is one request, and is kept in memory
INDEX_CACHE_SECONDS = 1.0  # an index that took longer is cached on disk, because making it reads the whole tar

HEADER_BYTES = 2**20  # of a long name, or of what is said of a member before its own header
BEFORE_MEMBER = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)

ENDS_EARLY = (0, -1, -1, 0, 0)  # in an index, after the last whole sample

Members = dict[str, tuple[int, int]]  # part of a name after its first dot -> offset and size in bytes


class NotATar(DataError):
    """A file is empty, or no tar."""


class TarSource(BlockSource):
    """Samples of uncompressed tars, one shard each: neighbouring members that share the name up to its first dot.

    `place.image_column` is the part of the image's member name after its first dot. If it is None, a sample must have
    only one member with the extension of an image. `place.label_column` is this part of a member that holds the label
    as text, else a key in the sample's `.json`. If it is None, it is `.cls`, else the key "label".

    Raises:
        DataError: if a tar cannot be read, no sample has an image, or one has several and none is chosen.
    """

    def __init__(self, place: Place, split: str):
        urls = place.splits[split]
        self._label_key = place.label_column or "label"
        loaded = in_threads(lambda url: _load_index(url, place.image_column, place.label_column), urls)
        wrong = [index for index in loaded if isinstance(index, NotATar)]
        if len(wrong) == len(loaded):
            raise wrong[0]
        for error in wrong:
            logger.warning("%s; it counts as one bad image", error)
        self._indices = [np.array([ENDS_EARLY]) if isinstance(index, NotATar) else index for index in loaded]
        if place.image_column and not any(map(len, self._indices)):
            message = f"no sample of {place.name} has a member .{place.image_column}"
            raise DataError(f"{message}; choose another --image_column")
        remote = is_remote(urls[0])
        edges = [_block_edges(index) if remote else [0, len(index)] for index in self._indices]
        super().__init__(place, split, edges, random_access=not remote)
        first = next((shard for shard, index in enumerate(self._indices) if len(index) and index[0, 1] >= 0), None)
        if place.label_column and first is not None and self.read(first, [0])[0].label is None:
            message = f"the first sample of {place.name} has no member .{place.label_column}"
            raise DataError(f"{message} and no such key in its .json; choose another --label_column")
        self.labels_from = self._find_labels(place.label_column or "cls")

    def _find_labels(self, member: str) -> str | None:
        """`Source.labels_from`, by the first samples that may have a label."""
        for shard, index in enumerate(self._indices):
            rows = np.flatnonzero(index[:, 2] >= 0)[:JSON_PROBED]
            if len(rows) and not index[rows[0], 4]:
                return f".{member} members"
            if any(row.label is not None for row in self.read(shard, rows.tolist())):
                return f"key {self._label_key} of .json members"
        return None

    def read(self, shard: int, rows: Sequence[int]) -> list[Row]:
        with open_bytes(self._urls[shard]) if self.random_access else nullcontext() as file:
            return [self._sample(shard, row, file) for row in rows]

    def _sample(self, shard: int, row: int, file: BinaryIO | None) -> Row:
        image_at, image_size, label_at, label_size, is_json = self._indices[shard][row].tolist()
        if image_size < 0:
            return self._row(shard, row, BadImage(f"{self.shard_names[shard]} ends early", "TruncatedTar"), None)
        image = self._bytes(shard, row, image_at, image_size, file)
        label = None
        if label_at >= 0:
            text = self._bytes(shard, row, label_at, label_size, file)
            label = _parse_label(text, self._label_key if is_json else None)
        return self._row(shard, row, image, label)

    def _bytes(self, shard: int, row: int, offset: int, size: int, file: BinaryIO | None) -> bytes:
        if file is None:
            start, block = self._block(shard, row)
            return block[offset - start : offset - start + size]
        with reading(self._urls[shard]):
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise DataError(f"{self._urls[shard]} has become shorter since the start of the run; restore the file")
        return content

    def _read_block(self, shard: int, number: int) -> tuple[int, bytes]:
        """Offset and bytes of a block."""
        start, stop = self._edges[shard][number : number + 2]
        starts, ends = _extents(self._indices[shard][start:stop])
        with open_bytes(self._urls[shard]) as file:
            first = file.seek(int(starts.min()))
            return first, file.read(int(ends.max()) - first)


def _extents(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every sample, the offset of its first byte and the offset after its last byte."""
    image, image_size, label, label_size, _ = index.T
    return np.where(label < 0, image, np.minimum(image, label)), np.maximum(image + image_size, label + label_size)


def _block_edges(index: np.ndarray) -> list[int]:
    """Cut samples into blocks of limited number and size: the first row of each, then the number of all rows."""
    starts, ends = (offsets.tolist() for offsets in _extents(index))
    edges = [0]
    for row in range(1, len(index)):
        if row - edges[-1] == BLOCK_SAMPLES or ends[row] - starts[edges[-1]] > BLOCK_BYTES:
            edges.append(row)
    return [*edges, len(index)]


def _parse_label(text: bytes, key: str | None) -> Any:
    """The label in a member, as an integer if it is one; None if it can't be read."""
    try:
        if key is not None:
            label = json.loads(text)[key]
            return as_utf8(label) if isinstance(label, str) else label
        word = text.decode().strip()
        return int(word) if word.lstrip("+-").isdecimal() else word
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _load_index(url: str, image_column: str | None, label_column: str | None) -> "np.ndarray | NotATar":
    """The index of a tar, from the cache if it has one; an error if the file isn't a tar."""
    cached = _cache_path(url, image_column, label_column)
    if cached is not None:
        with suppress(ValueError, OSError, EOFError):  # absent, half written or outdated: it is made again below
            return np.load(cached, allow_pickle=False)
    started = time.monotonic()
    try:
        index = _make_index(url, image_column, label_column)
    except NotATar as error:
        return error
    if cached is not None and time.monotonic() - started > INDEX_CACHE_SECONDS:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with replaced(cached) as temporary:
                np.save(temporary, index)
        except OSError as error:
            logger.warning("the index of %s can't be cached (%s)", url, one_line(error))
    return index


def _cache_path(url: str, image_column: str | None, label_column: str | None) -> Path | None:
    """The cache file for the index of this version of a remote file; None if its versions can't be told apart."""
    if not is_remote(url):
        return None
    from datasets import config

    fs, path = fsspec.core.url_to_fs(url)
    if "hf" in fs.protocol:
        version = url  # contains the commit
    else:
        info = with_retries(lambda: fs.info(path), url)
        version = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime") if info.get(key)), None)
    if version is None:
        return None
    key = url, str(version), (image_column, label_column)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    return Path(config.HF_DATASETS_CACHE) / "hf_mae_tar_indices" / f"{digest}.npy"


def _make_index(url: str, image_column: str | None, label_column: str | None) -> np.ndarray:
    """Read a tar's headers.

    Returns:
        (n, 5) int64: image offset and size, label offset (-1: none) and size in bytes, 1 if the label is JSON. A tar
        that ends early has one more row, with image size -1, for everything that is missing.
    """
    places = []
    without: list[str] = []  # members of samples that have no image
    with open_bytes(url, read_ahead=True) as file, reading(url):
        for members in _samples(file, url):
            if members is None:
                # At the offset of the previous sample, so that the block doesn't grow.
                places.append((places[-1][0] if places else 0, *ENDS_EARLY[1:]))
                continue
            if image_column is not None:
                images = [image_column.lower()] if image_column.lower() in members else []
            else:
                images = [field for field in members if f".{field}".endswith(IMAGE_EXTENSIONS)]
            if len(images) > 1:
                names = ", ".join(sorted(images))
                raise DataError(f"{url} has several images per sample ({names}); choose one with --image_column NAME")
            if not images:
                without += [f"*.{field}" for field in members]
                continue
            field = (label_column or "cls").lower()
            field = field if field in members and field not in images else "json"
            places.append((*members[images[0]], *members.get(field, (-1, 0)), field == "json"))
    archive = next((name for name in without if name.endswith((".tar", *PACKED))), None)
    if archive and not places:
        raise DataError(f"{url} holds archives ({archive}), not images; unpack it, and give the folder")
    if left_out := Endings(without).others("imagefolder"):
        logger.warning("%s: left out: %s", url, left_out)
    return np.array(places, dtype=np.int64).reshape(-1, 5)


def _samples(file: BinaryIO, url: str) -> Iterator[Members | None]:
    """Groups of neighbouring members with one name; then None, if the tar ends early."""
    sample: Members = {}
    current: str | None = None
    fields: set[str] = set()  # of the previous sample
    damaged = False
    try:
        for name, offset, size in _members(file, url):
            folder, slash, file_name = name.rpartition("/")
            base, dot, field = file_name.partition(".")
            if not (base and dot):
                continue
            if folder + slash + base != current or field.lower() in sample:
                if sample:
                    yield sample
                    fields = set(sample)
                sample, current = {}, folder + slash + base
            sample[field.lower()] = (offset, size)
    except tarfile.TarError:
        damaged = True
    # The last sample may lack members that lie behind the damage.
    if sample and (not damaged or not fields or set(sample) == fields):
        yield sample
    if damaged:
        logger.warning("%s ends early, in the middle of a sample or without its end mark; fetch it again", url)
        yield None


def _members(file: BinaryIO, url: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each regular file in a tar, without sparse ones.

    `tarfile` trusts headers: a negative size sends it in circles, and a long name may fill the memory.

    Raises:
        NotATar: if it doesn't start as one.
        tarfile.ReadError: at the first damaged or missing header, or if a member is cut off.
    """
    end, offset = file.seek(0, 2), 0
    own: dict[str, bytes] = {}  # what headers before a member's own one say of it
    while True:
        try:
            block = _header_block(file, offset)
            if not any(block):
                return
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            if offset == 0:
                message = f"{url} is not an uncompressed tar ({one_line(error)}); decompress it, or fetch it again"
                raise NotATar(message) from error
            raise tarfile.ReadError from error
        offset += tarfile.BLOCKSIZE
        sparse = header.type == tarfile.GNUTYPE_SPARSE
        more = sparse and block[482]  # its map continues in the next block
        while more:
            more = _header_block(file, offset)[504]
            offset += tarfile.BLOCKSIZE
        before = header.type in BEFORE_MEMBER
        size = _whole_number(own["size"] if "size" in own and not before else b"%d" % header.size)
        has_data = before or header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        if has_data and size > min(end - offset, HEADER_BYTES if before else end):
            raise tarfile.ReadError
        if before:
            own |= _said_before(header.type, file.read(size))
        else:
            sparse = sparse or any(key.startswith("GNU.sparse.") for key in own)
            if header.isreg() and not sparse:
                name = own["path"].decode(errors="surrogateescape") if "path" in own else header.name
                yield name, offset, size
            own = {}
        offset += -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if has_data else 0


def _header_block(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends in a header" if block else "it is empty")
    return block


def _said_before(kind: bytes, content: bytes) -> dict[str, bytes]:
    """What a header before a member's own one says of it: "path", "size" and other keys of POSIX's extended headers."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.partition(b"\0")[0]}
    said, at = {}, 0
    while kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) and at < len(content):
        # LENGTH KEY=VALUE and a line end; LENGTH counts all of these bytes.
        digits = content[at : at + 20].partition(b" ")[0]
        start, stop = at + len(digits) + 1, at + _whole_number(digits)
        key, equals, value = content[start : max(start, stop - 1)].partition(b"=")
        if not equals or stop > len(content):
            raise tarfile.ReadError
        said[key.decode(errors="replace")], at = value, stop
    return said


def _whole_number(digits: bytes) -> int:
    if digits.isdigit() and len(digits) < 20:
        return int(digits)
    raise tarfile.ReadError
