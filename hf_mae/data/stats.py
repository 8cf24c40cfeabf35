"""What an image processor needs to know about a data set: channels, pixel type, mean and standard deviation."""

import logging
from typing import Any

import numpy as np

from ..errors import DataError
from .decode import BadImage, decode_image, probe_image
from .order import Rows, spread
from .transform import RESCALE_FACTORS

logger = logging.getLogger(__name__)


def probe_rows(rows: Rows, num_channels: int | None = None, most: int = 16) -> tuple[int, str]:
    """The `num_channels` and `dtype` of a data set, found from up to `most` of its images.

    Grey images among colour images count as colour, 8-bit images among 16-bit images as 16-bit. The number of channels
    is the given one if any of the images can be decoded to it.

    Raises:
        DataError: if none can be decoded, or the numbers of channels don't match.
    """
    kinds: list[tuple[int, str]] = []
    last_error = ""
    for row in rows.read(spread(rows.index, most, rows.source)):
        try:
            kinds.append(probe_image(row.image, num_channels))
        except BadImage as error:
            last_error = f"{row.key}: {error}"
    if not kinds:
        raise DataError(f"none of the first images of {rows.source.name} can be decoded ({last_error}); check the data")
    channels, dtypes = {c for c, _ in kinds}, {d for _, d in kinds}
    if num_channels in channels:
        channels = {num_channels}
    if not all(channels_fit(c, max(channels)) for c in channels):
        raise DataError(
            f"images of {rows.source.name} have {' and '.join(map(str, sorted(channels)))} channels; keep only one "
            "kind, or pass --num_channels: images with another number are then skipped as bad"
        )
    return max(channels), next(d for d in ("float32", "uint16", "uint8") if d in dtypes)


def channels_fit(have: int, wanted: int) -> bool:
    """Whether images of `have` channels can be decoded to `wanted` ones: the same number, or grey and colour."""
    return have == wanted or {have, wanted} == {1, 3}


class ChannelStats:
    """Figures of each channel over all pixels of the images that are added.

    Args:
        num_channels: C.
        nodata: value that stands for a missing pixel, besides NaN.

    Attributes:
        count, mean, squares: (C,) number of pixels with data, their mean, and their squared distances from it.
        infinite: (C,) number of pixels that are infinite; they are in none of the others.
    """

    SAMPLED = 64  # pixels of each image, from which percentiles are computed

    def __init__(self, num_channels: int, nodata: float | None = None):
        self.nodata, self.total = nodata, 0
        self.count, self.mean, self.squares, self.zeros, self.infinite = np.zeros((5, num_channels))
        self.low, self.high = np.full(num_channels, np.inf), np.full(num_channels, -np.inf)
        self._sample: list[np.ndarray] = []

    def add(self, image: np.ndarray) -> tuple[int, int]:
        """Add an image, (H, W, C); returns how many of its values are missing, and how many infinite."""
        pixels = image.reshape(-1, len(self.mean)).astype(np.float64)
        missing = np.isnan(pixels) if self.nodata is None else np.isnan(pixels) | (pixels == self.nodata)
        infinite = np.isinf(pixels)
        self.total += len(pixels)
        self.infinite += infinite.sum(axis=0)
        self.zeros += (pixels == 0).sum(axis=0)
        self._sample.append(np.where(missing | infinite, np.nan, pixels)[:: max(1, len(pixels) // self.SAMPLED)])
        for channel, good in enumerate(~(missing | infinite).T):
            if good.any():
                self._add_channel(channel, pixels[good, channel])
        return int(missing.sum()), int(infinite.sum())

    def _add_channel(self, channel: int, values: np.ndarray) -> None:
        """Merge an image's values (Chan et al.), because a sum of squares of 16-bit pixels would lose precision."""
        before = self.count[channel]
        after, delta = before + len(values), values.mean() - self.mean[channel]
        self.squares[channel] += values.var() * len(values) + delta**2 * before * len(values) / after
        self.mean[channel] += delta * len(values) / after
        self.count[channel] = after
        self.low[channel] = min(self.low[channel], values.min())
        self.high[channel] = max(self.high[channel], values.max())

    @property
    def std(self) -> np.ndarray:
        """(C,) standard deviations."""
        return np.sqrt(self.squares / np.maximum(self.count, 1))

    def divisor(self, factor: float = 1.0) -> np.ndarray:
        """(C,) standard deviations of the pixels times `factor`; 1 for a constant channel, which would divide by 0."""
        # The threshold is relative, since the data may have any unit.
        return np.where(self.std > 1e-9 * np.abs(self.mean), self.std * factor, 1.0)

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


def channel_stats(rows: Rows, num_channels: int, dtype: str, max_samples: int = 2048) -> dict[str, Any]:
    """Mean and standard deviation of each channel over all pixels of up to `max_samples` images, chosen by `spread`.

    NaN stands for a missing pixel and isn't counted.

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
            image = np.asarray(decode_image(row.image, num_channels, dtype), dtype=np.float64)
        except BadImage as error:
            last_error = f"{row.key}: {error}"
            continue
        good += 1
        stats.add(image * RESCALE_FACTORS[dtype])
    if not good:
        name = rows.source.name
        raise DataError(f"none of {len(index)} images of {name} can be decoded ({last_error}); check the data")
    if stats.infinite.any() or not np.isfinite(stats.std).all():
        raise DataError(f"{rows.source.name} has pixels that are not finite numbers; replace them before training")
    return {
        "image_mean": stats.mean.tolist(),
        "image_std": stats.divisor().tolist(),
        "rescale_factor": RESCALE_FACTORS[dtype],
        "num_images": good,
        "num_bad": len(index) - good,
    }
