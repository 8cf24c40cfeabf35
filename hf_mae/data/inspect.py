"""`hf-mae inspect`: what the package sees in a data set, and what is wrong with it.

One pass over the rows hashes every image and counts its label; some images are also decoded and measured. The pass ends
after `SECONDS`. Rows of a local data set are visited in runs that are spread over all of it, so that those read by then
are a fair sample; the result says how many they are.
"""

import hashlib
import io
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import DataError
from ..keys.data_keys import InspectRecipe
from .decode import BadImage, decode_image, probe_image
from .labels import is_missing, labels_of, named
from .locate import locate
from .order import Rows
from .shards import Row
from .sources import open_split
from .stats import ChannelStats, probe_rows
from .transform import RESCALE_FACTORS, size_of
from .understood import describe_splits

SECONDS = 24.0  # of reading, over all splits; finding the files takes some more
DECODED = 2048  # images of each split that are measured
RUN = 256  # rows that are read one after the other, at most
SHOWN = 48  # images of each split on the contact sheet
SHOWN_BAD = 8  # of them, images that can't be decoded
THUMBNAIL = 192  # pixels of the longer side, or a little more


@dataclass
class Tile:
    """An image for the contact sheet: (h, w, C) reduced pixels, or None if it can't be decoded; and a caption."""

    pixels: np.ndarray | None
    caption: str


@dataclass
class Tally:
    """How many images are of each kind, and the key of the first of them."""

    counts: Counter[Any] = field(default_factory=Counter)
    first: dict[Any, str] = field(default_factory=dict)

    def add(self, kind: Any, key: str) -> None:
        self.counts[kind] += 1
        self.first[kind] = min(key, self.first.get(kind, key))  # rows come in no order


class BandFigures(ChannelStats):
    """The figures of each channel that a person looks at."""

    SAMPLED = 64  # pixels of each image, from which percentiles are computed

    def __init__(self, num_channels: int):
        super().__init__(num_channels)
        self.total, self.zeros = 0, np.zeros(num_channels)
        self.low, self.high = np.full(num_channels, np.inf), np.full(num_channels, -np.inf)
        self._sample: list[np.ndarray] = []

    def add_image(self, image: np.ndarray) -> tuple[int, int]:
        """Add an image, (H, W, C); returns how many of its values are missing (NaN), and how many infinite."""
        pixels = image.reshape(-1, len(self.mean)).astype(np.float64)
        infinite = np.isinf(pixels)
        missing = int(np.isnan(pixels).sum())
        pixels[infinite] = np.nan
        self.total += len(pixels)
        self.zeros += (pixels == 0).sum(axis=0)
        self.low, self.high = np.fmin(self.low, np.fmin.reduce(pixels)), np.fmax(self.high, np.fmax.reduce(pixels))
        self._sample.append(pixels[:: max(1, len(pixels) // self.SAMPLED)].copy())
        self.add(pixels)
        return missing, int(infinite.sum())

    def table(self, rescale_factor: float) -> list[dict[str, Any]]:
        """For each channel, in raw units: `mean`, `std`, `min`, `p1`, `p50`, `p99` and `max`, None without data.

        Also the shares `zeros` and `no_data` of its pixels; and as used, after rescaling: `image_mean`, `image_std`.
        """
        sample = np.concatenate(self._sample)
        rows = []
        for channel, (count, mean) in enumerate(zip(self.count, self.mean, strict=True)):
            values = sample[:, channel][~np.isnan(sample[:, channel])]
            figures = dict.fromkeys(("mean", "std", "min", "p1", "p50", "p99", "max"))
            if count:
                figures |= {"mean": mean, "std": self.std[channel], "min": self.low[channel], "max": self.high[channel]}
            if len(values):
                figures |= zip(("p1", "p50", "p99"), np.percentile(values, (1, 50, 99)), strict=True)
            shares = {"zeros": self.zeros[channel] / self.total, "no_data": 1 - count / self.total}
            used = {"image_mean": mean * rescale_factor, "image_std": self.divisor(rescale_factor)[channel]}
            found = figures | shares | used
            rows.append({key: None if value is None else float(value) for key, value in found.items()})
        return rows


def inspect(recipe: InspectRecipe) -> tuple[dict[str, Any], dict[str, list[Tile]]]:
    """Look at a data set.

    Returns:
        What was found, in JSON's types, and split -> images for a contact sheet. The former has
        `dataset`, `kind`, and `splits_from`, which tells the splits apart (None for a single one);
        `splits`: for each split `rows`, `read` and `decoded`, the numbers of all its images, of those that were hashed
        and of those that were measured; `labels`, class -> images; `unlabelled`; `labels_from`, as in `Source`;
        `formats`, `sizes`, `depths`, `channels`, value -> measured images; `bad`, reason -> number and first key;
        `as_used`, the number of channels and dtype that images are decoded to; `bands`, the table of `BandFigures`;
        `copies`, groups of keys of identical files;
        `leaks`: split -> key, for each file that is in several splits;
        `faults`: one line for each thing that is wrong.

    Raises:
        DataError: if the data can't be found or read.
    """
    faults: list[str] = []
    with _warnings_into(faults):
        place = locate(recipe)
        splits = [recipe.split] if recipe.split else list(place.splits)
        sources = [Rows(open_split(place, split), max_samples=recipe.max_samples) for split in splits]
        looks = [_Look(rows, recipe, SECONDS / len(sources)) for rows in sources]
    copies, leaks = _find_copies(looks)
    found = {
        "dataset": place.name,
        "kind": place.kind,
        "splits_from": place.splits_from,
        "splits": {look.name: {**look.found(), "copies": copies[look.name]} for look in looks},
        "leaks": leaks,
    }
    return {**found, "faults": [*faults, *_faults(found, looks)]}, {look.name: look.tiles for look in looks}


class _Look:
    """One pass over the rows of a split, for at most `seconds`, half of it for decoding."""

    def __init__(self, rows: Rows, recipe: InspectRecipe, seconds: float):
        self.rows, self.recipe, self.name = rows, recipe, rows.source.split
        self.read = self.decoded = self.unlabelled = 0
        self.digests: list[tuple[bytes, str]] = []
        self.labels: Counter[str] = Counter()
        self.formats, self.sizes, self.channels, self.depths = Tally(), Tally(), Tally(), Tally()
        self.bad, self.no_data, self.not_finite = Tally(), Tally(), Tally()
        self.tiles: list[Tile] = []
        self.num_channels, self.dtype = 0, ""
        self.stats: BandFigures | None = None
        self._known = rows.source.known_labels() is not None
        for label in labels_of(rows) if self._known else ():
            self._count_label(label)
        self._look(seconds)

    def _look(self, seconds: float) -> None:
        every, start, decoding = max(1, len(self.rows) // DECODED), time.monotonic(), 0.0
        with tqdm(total=len(self.rows), desc=self.name, unit="image", disable=None, leave=False) as bar:
            for row in _spread_out(self.rows):
                bar.update()
                self.read += 1
                if not self._known:
                    self._count_label(row.label)
                if not isinstance(row.image, BadImage):
                    self.digests.append((_digest(row.image), row.key))
                before = time.monotonic()
                if isinstance(row.image, BadImage) or (self.read % every == 0 and decoding < seconds / 2):
                    self._measure(row)
                    decoding += time.monotonic() - before
                if time.monotonic() - start > seconds:
                    return

    def _count_label(self, label: Any) -> None:
        if is_missing(label, self.rows.source):
            self.unlabelled += 1
            return
        label = named(label, self.rows.source)
        for value in label if isinstance(label, list) else [label]:
            self.labels[str(value)] += 1

    def _measure(self, row: Row) -> None:
        """Decode an image and add its figures."""
        try:
            channels, dtype = probe_image(row.image)
            if self.stats is None:
                try:
                    probe = probe_rows(self.rows, self.recipe.num_channels)
                    found, self.dtype = probe.num_channels, probe.dtype
                except DataError:  # images differ too much for one kind; the faults say so
                    found, self.dtype = channels, dtype
                self.num_channels = self.recipe.num_channels or found
                self.stats = BandFigures(self.num_channels)
            pixels = np.asarray(decode_image(row.image, self.num_channels, self.dtype, nodata=self.recipe.nodata))
        except BadImage as error:
            self.bad.add(error.reason, row.key)
            if self.bad.counts.total() <= SHOWN_BAD:
                self.tiles.append(Tile(None, error.reason))
            return
        self.decoded += 1
        pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
        for tally, kind in (
            (self.formats, _format(row.image)),
            (self.sizes, size_of(pixels)),
            (self.channels, channels),
            (self.depths, dtype),
        ):
            tally.add(kind, row.key)
        missing, infinite = self.stats.add_image(pixels)
        for tally, wrong in ((self.no_data, missing), (self.not_finite, infinite)):
            if wrong:
                tally.add("images", row.key)
        if len(self.tiles) < SHOWN:
            step = max(1, max(pixels.shape[:2]) // THUMBNAIL)
            self.tiles.append(Tile(pixels[::step, ::step].copy(), row.key.rpartition("/")[2]))

    def found(self) -> dict[str, Any]:
        """The table of this split, but its copies."""
        return {
            "rows": len(self.rows),
            "read": self.read,
            "decoded": self.decoded,
            "labels": dict(sorted(self.labels.items())),
            "unlabelled": self.unlabelled,
            "labels_from": self.rows.source.labels_from,
            "formats": dict(self.formats.counts.most_common()),
            "sizes": {f"{height} x {width}": count for (height, width), count in self.sizes.counts.most_common()},
            "depths": dict(self.depths.counts.most_common()),
            "channels": {str(number): count for number, count in self.channels.counts.most_common()},
            "bad": {reason: [count, self.bad.first[reason]] for reason, count in self.bad.counts.most_common()},
            "as_used": {"num_channels": self.num_channels, "dtype": self.dtype} if self.decoded else None,
            "bands": self.stats.table(RESCALE_FACTORS[self.dtype]) if self.stats and self.decoded else [],
        }


def _spread_out(rows: Rows) -> Iterator[Row]:
    """All rows, in runs that are spread over the data if it is local, else in order."""
    if rows.source.random_access:
        run = max(1, min(RUN, len(rows) // 64))
        starts = np.random.default_rng(0).permutation(np.arange(0, len(rows), run))
        runs = [(start, start + run) for start in starts]
    else:
        runs = [tuple(block) for block in rows.blocks]
    for start, stop in runs:
        yield from rows.read(rows.index[start:stop])


def _digest(image: bytes | np.ndarray) -> bytes:
    content = image if isinstance(image, bytes) else f"{image.dtype} {image.shape}".encode() + image.tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _format(image: bytes | np.ndarray | BadImage) -> str:
    """The file format, as Pillow calls it; "array" for one that Pillow doesn't read."""
    try:
        return Image.open(io.BytesIO(image)).format or "array" if isinstance(image, bytes) else "array"
    except OSError:
        return "array"


def _find_copies(looks: list[_Look]) -> tuple[dict[str, list[list[str]]], list[dict[str, str]]]:
    """Split -> groups of keys of identical files; and split -> key of those that are in several splits."""
    places: dict[bytes, list[tuple[str, str]]] = {}
    for look in looks:
        for digest, key in look.digests:
            places.setdefault(digest, []).append((look.name, key))
    copies: dict[str, list[list[str]]] = {look.name: [] for look in looks}
    leaks = []
    for group in places.values():
        if len(group) == 1:
            continue
        keys = {split: sorted(key for other, key in group if other == split) for split, _ in group}
        for split, same in keys.items():
            if len(same) > 1:
                copies[split].append(same)
        if len(keys) > 1:
            leaks.append({split: same[0] for split, same in keys.items()})
    return {split: sorted(groups) for split, groups in copies.items()}, leaks


def _faults(found: dict[str, Any], looks: list[_Look]) -> Iterator[str]:
    """One line for each thing that is wrong, with a count and the first image."""
    for look in looks:
        split = found["splits"][look.name]
        for reason, (count, key) in split["bad"].items():
            yield f"{look.name}: {_images(count)} can't be decoded: {reason}, first {key}"
        for what, tally in (("depth", look.depths), ("number of channels", look.channels)):
            if len(tally.counts) > 1:
                kinds = ", ".join(
                    f"{kind} in {count:,} (first {tally.first[kind]})" for kind, count in tally.counts.most_common()
                )
                yield f"{look.name}: images differ in {what}: {kinds}"
        for number, band in enumerate(split["bands"]):
            if band["min"] is not None and band["min"] == band["max"]:
                yield f"{look.name}: channel {number} is constant: {band['min']:g}"
        for tally, what in ((look.no_data, "pixels without data"), (look.not_finite, "infinite pixels")):
            if count := tally.counts["images"]:
                yield f"{look.name}: {_images(count)} with {what}, first {tally.first['images']}"
        if split["copies"]:
            count, example = sum(len(group) - 1 for group in split["copies"]), split["copies"][0]
            yield f"{look.name}: {_images(count)} repeated, e.g. {example[0]} as {example[1]}"
        if split["labels"] and split["unlabelled"]:
            yield f"{look.name}: {_images(split['unlabelled'])} without a label"
    if leaks := found["leaks"]:
        yield f"{_images(len(leaks))} in several splits, e.g. {' and '.join(leaks[0].values())}"
    yield from _class_faults(found["splits"])


def _class_faults(splits: dict[str, Any]) -> Iterator[str]:
    names = {split: set(table["labels"]) for split, table in splits.items() if table["labels"]}
    train = names.get("train")
    for split, classes in names.items() if train else ():
        if unknown := sorted(classes.difference(train or ())):
            shown = ", ".join(unknown[:5]) + (f", ... ({len(unknown)})" if len(unknown) > 5 else "")
            yield f"{split}: classes that train doesn't have: {shown}"


def _images(count: int) -> str:
    return f"{count:,} image" + "s" * (count != 1)


@contextmanager
def _warnings_into(lines: list[str]) -> Iterator[None]:
    """Collect the package's warnings instead of printing them."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger(__package__.partition(".")[0]), Collector(logging.WARNING)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.propagate = propagates
        logger.removeHandler(handler)


def describe_inspection(found: dict[str, Any]) -> str:
    """What was found, as tables for the terminal."""
    lines = describe_whole(found)
    for name, split in found["splits"].items():
        lines += ["", *describe_split(name, split), *_describe_bands(split["bands"])]
    return "\n".join([*lines, "", *([f"! {fault}" for fault in found["faults"]] or ["nothing wrong was found"])])


def describe_whole(found: dict[str, Any]) -> list[str]:
    """Lines about the data set and its splits."""
    splits = f"{', '.join(found['splits'])} ({describe_splits(found['splits_from'])})"
    return [f"{found['dataset']} ({found['kind']})", splits]


def describe_split(name: str, split: dict[str, Any]) -> list[str]:
    """Lines about the images and labels of a split."""
    part = "" if split["read"] == split["rows"] else f"; there was time to read {split['read']:,} of them"
    lines = [f"{name}: {_images(split['rows'])}{part}"]
    if used := split["as_used"]:
        lines += [
            f"  measured  {split['decoded']:,} of them, as {used['num_channels']} x {used['dtype']}",
            f"  formats   {_counts(split['formats'])}",
            f"  depth     {_counts(split['depths'])}; channels: {_counts(split['channels'])}",
            f"  sizes     {_counts(split['sizes'])}",
        ]
    origin = f", from {split['labels_from']}" if split["labels_from"] else ""
    return [*lines, f"  labels    {_counts(split['labels']) if split['labels'] else 'none'}{origin}"]


COLUMNS = {"mean": "mean", "std": "std", "min": "min", "p1": "1 %", "p50": "50 %", "p99": "99 %", "max": "max"}


def _describe_bands(bands: list[dict[str, Any]]) -> Iterator[str]:
    if not bands:
        return
    yield "  channel" + "".join(f"{heading:>11}" for heading in COLUMNS.values()) + "   zeros  no data"
    for number, band in enumerate(bands):
        figures = "".join(f"{_number(band[key]):>11}" for key in COLUMNS)
        yield f"  {number:<7}{figures}{band['zeros']:8.1%}{band['no_data']:9.1%}"
    for key in ("image_mean", "image_std"):
        yield f"  {key:10} {' '.join(_number(band[key]) for band in bands)}, of pixels as used"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _counts(counts: dict[str, int], most: int = 6) -> str:
    shown = ", ".join(f"{name}: {count:,}" for name, count in list(counts.items())[:most])
    return shown + (f", ... ({len(counts)} kinds)" if len(counts) > most else "")
