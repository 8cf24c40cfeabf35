"""What an image processor needs to know about a data set: channels, pixel type, mean and standard deviation."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from .decode import BadImage, Sample, decode_image, probe_sample
from .order import Rows, spread
from .transform import RESCALE_FACTORS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """What a few images of a data set are like.

    Attributes:
        num_channels: fits all of them.
        dtype: fits all of them: "uint8", "uint16" or "float32".
        channels: the numbers of channels that they have, ascending.
        sizes: (n, 2) height and width in pixels of each image that could be opened.
        labels: of each image, as the source stores them.
    """

    num_channels: int
    dtype: str
    channels: list[int]
    sizes: np.ndarray
    labels: list[Any]


def probe_rows(rows: Rows, num_channels: int | None = None, most: int = 16) -> Probe:
    """Look at up to `most` images of a data set.

    Grey images among colour images count as colour, 8-bit images among 16-bit images as 16-bit. The number of channels
    is the given one if any of the images can be decoded to it.

    Raises:
        DataError: if none can be decoded, or the numbers of channels don't match.
    """
    samples: list[Sample] = []
    labels: list[Any] = []
    last_error = ""
    for row in rows.read(spread(rows.index, most, rows.source)):
        labels.append(row.label)
        try:
            samples.append(probe_sample(row.image, num_channels))
        except BadImage as error:
            last_error = f"{row.key}: {error}"
    if not samples:
        raise DataError(f"none of the first images of {rows.source.name} can be decoded ({last_error}); check the data")
    channels, dtypes = {sample.num_channels for sample in samples}, {sample.dtype for sample in samples}
    if num_channels in channels:
        channels = {num_channels}
    if not all(channels_fit(c, max(channels)) for c in channels):
        raise DataError(
            f"images of {rows.source.name} have {' and '.join(map(str, sorted(channels)))} channels; keep only one "
            "kind, or pass --num_channels: images with another number are then skipped as bad"
        )
    dtype = next(d for d in ("float32", "uint16", "uint8") if d in dtypes)
    stored, sizes = sorted({sample.channels for sample in samples}), np.array([sample.size for sample in samples])
    return Probe(max(channels), dtype, stored, sizes, labels)


def channels_fit(have: int, wanted: int) -> bool:
    """Whether images of `have` channels can be decoded to `wanted` ones: the same number, or grey and colour."""
    return have == wanted or {have, wanted} == {1, 3}


class ChannelStats:
    """Mean and standard deviation of each channel over all pixels that are added.

    Attributes:
        count, mean, squares: (C,) number of pixels with data, their mean, and their squared distances from it.
    """

    def __init__(self, num_channels: int):
        self.count, self.mean, self.squares = np.zeros((3, num_channels))

    def add(self, pixels: np.ndarray) -> None:
        """Add an image's pixels, (n, C) float64; NaN is a missing one."""
        missing = np.isnan(pixels)
        count = len(pixels) - missing.sum(axis=0)
        if missing.any():
            mean = np.where(missing, 0.0, pixels).sum(axis=0) / np.maximum(count, 1)
            squares = np.where(missing, 0.0, pixels - mean)
            squares = np.square(squares).sum(axis=0)
        else:
            mean, squares = pixels.mean(axis=0), pixels.var(axis=0) * len(pixels)
        # Merged image by image (Chan et al.), because a sum of squares of 16-bit pixels would lose precision.
        delta, total = mean - self.mean, self.count + count
        self.squares += squares + delta**2 * self.count * count / np.maximum(total, 1)
        self.mean += delta * count / np.maximum(total, 1)
        self.count = total

    @property
    def std(self) -> np.ndarray:
        """(C,) standard deviations."""
        return np.sqrt(self.squares / np.maximum(self.count, 1))

    def divisor(self, factor: float = 1.0) -> np.ndarray:
        """(C,) standard deviations of the pixels times `factor`; 1 for a constant channel, which would divide by 0."""
        # The threshold is relative, since the data may have any unit.
        return np.where(self.std > 1e-9 * np.abs(self.mean), self.std * factor, 1.0)


def channel_stats(
    rows: Rows, num_channels: int, dtype: str, max_samples: int = 2048, nodata: float | None = None
) -> dict[str, Any]:
    """Mean and standard deviation of each channel over all pixels of up to `max_samples` images, chosen by `spread`.

    NaN and `nodata`, a value in the unit of `dtype`, stand for a missing pixel and aren't counted.

    Returns:
        `image_mean` and `image_std` (C numbers each, of pixels rescaled by `RESCALE_FACTORS`: for uint8 in [0, 1]),
        `rescale_factor`, `num_images`, `num_bad`.

    Raises:
        DataError: if no image can be decoded, or pixels are infinite.
    """
    stats, good, last_error = ChannelStats(num_channels), 0, ""
    index = spread(rows.index, max_samples, rows.source)
    for row in rows.read(index):
        try:
            image = np.asarray(decode_image(row.image, num_channels, dtype, nodata=nodata), dtype=np.float64)
        except BadImage as error:
            last_error = f"{row.key}: {error}"
            continue
        good += 1
        stats.add(image.reshape(-1, num_channels) * RESCALE_FACTORS[dtype])
    if not good:
        name = rows.source.name
        raise DataError(f"none of {len(index)} images of {name} can be decoded ({last_error}); check the data")
    if not (np.isfinite(stats.mean).all() and np.isfinite(stats.std).all()):
        raise DataError(f"{rows.source.name} has pixels that are not finite numbers; replace them before training")
    return {
        "image_mean": stats.mean.tolist(),
        "image_std": stats.divisor().tolist(),
        "rescale_factor": RESCALE_FACTORS[dtype],
        "num_images": good,
        "num_bad": len(index) - good,
    }
