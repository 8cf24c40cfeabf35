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


def channel_stats(rows: Rows, num_channels: int, dtype: str, max_samples: int = 2048) -> dict[str, Any]:
    """Mean and standard deviation of each channel over all pixels of up to `max_samples` images, chosen by `spread`.

    Returns:
        `image_mean` and `image_std` (C numbers each, of pixels rescaled by `RESCALE_FACTORS`: for uint8 in [0, 1]),
        `rescale_factor`, `num_images`, `num_bad`.

    Raises:
        DataError: if no image can be decoded, or pixels are not finite.
    """
    count, bad, last_error = 0.0, 0, ""
    mean, squares = np.zeros(num_channels), np.zeros(num_channels)
    index = spread(rows.index, max_samples, rows.source)
    for row in rows.read(index):
        try:
            image = np.asarray(decode_image(row.image, num_channels, dtype), dtype=np.float64)
        except BadImage as error:
            bad, last_error = bad + 1, f"{row.key}: {error}"
            continue
        pixels = image.reshape(-1, num_channels) * RESCALE_FACTORS[dtype]
        # Merged image by image (Chan et al.), because a sum of squares of 16-bit pixels would lose precision.
        delta, total = pixels.mean(axis=0) - mean, count + len(pixels)
        squares += pixels.var(axis=0) * len(pixels) + delta**2 * count * len(pixels) / total
        mean += delta * len(pixels) / total
        count = total
    if count == 0:
        name = rows.source.name
        raise DataError(f"none of {len(index)} images of {name} can be decoded ({last_error}); check the data")
    std = np.sqrt(squares / count)
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise DataError(f"{rows.source.name} has pixels that are not finite numbers; replace them before training")
    return {
        "image_mean": mean.tolist(),
        # A constant channel would be divided by zero. The threshold is relative, since the data may have any unit.
        "image_std": np.where(std > 1e-9 * np.abs(mean), std, 1.0).tolist(),
        "rescale_factor": RESCALE_FACTORS[dtype],
        "num_images": len(index) - bad,
        "num_bad": bad,
    }
