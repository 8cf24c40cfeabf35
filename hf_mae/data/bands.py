"""Arrays of pixels: which axis holds the channels, what the bands are, and conversion between our dtypes.

Shape letters in this file
    H, W pixels   C channels
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..image_processing_base_mae import band_axis, mark_missing, on_white, to_8_bits, to_16_bits
from .limits import BadImage

_LUMA = np.array([19_595, 38_470, 7_471])  # of 65,536: red, green and blue, as in Pillow's conversion to grey


@dataclass(frozen=True)
class Bands:
    """The pixels of a file that says what its bands are, upright: a picture that Pillow has no mode for, or a TIFF.

    Args:
        pixels: (H, W, C).
        is_rgb: whether the first three bands are red, green and blue.
        has_alpha: whether the last band is transparency.
    """

    pixels: np.ndarray
    is_rgb: bool = False
    has_alpha: bool = False

    @property
    def is_picture(self) -> bool:
        """Whether it can be shown, in grey or colour."""
        return self.is_rgb or self.pixels.shape[-1] == 1 + self.has_alpha

    @property
    def num_channels(self) -> int:
        """C, or 3 for a picture with transparency, as for those that Pillow reads."""
        return 3 if self.has_alpha and self.pixels.shape[-1] in (2, 4) else self.pixels.shape[-1]

    def gives(self, num_channels: int) -> bool:
        """Whether `with_channels` has a result."""
        exact = num_channels in (self.num_channels, self.pixels.shape[-1])
        return exact or (num_channels in (1, 3) and self.is_picture) or (num_channels == 4 and self.has_alpha)

    def with_channels(self, num_channels: int) -> np.ndarray:
        """(H, W, num_channels). Four channels keep the transparency; one and three are composited on white."""
        pixels, count = self.pixels, self.pixels.shape[-1]
        if num_channels == count:
            return pixels
        if num_channels == 4 and self.has_alpha and count == 2:
            return pixels[:, :, [0, 0, 0, 1]]
        if num_channels not in (1, 3) or not self.is_picture:
            raise wrong_channels(pixels.shape, num_channels)
        if self.has_alpha:
            pixels = _composited(pixels)
        if num_channels == 3:
            return pixels[:, :, :3] if self.is_rgb else np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        if not self.is_rgb:
            return pixels
        gray = pixels[:, :, :3].astype(np.float64) @ _LUMA / 2**16
        return (gray if pixels.dtype.kind == "f" else np.floor(gray + 0.5)).astype(pixels.dtype)[:, :, None]


def _composited(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (H, W, C - 1), on white where it is transparent. Floats must lie in [0, 1]."""
    wide = pixels.astype({"u1": np.uint8, "u2": np.int32}.get(pixels.dtype.str[1:], np.float32))
    opaque = on_white(torch.from_numpy(np.moveaxis(wide, -1, 0)))
    return np.moveaxis(opaque.numpy(), 0, -1).astype(pixels.dtype)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) stored with an EXIF orientation, from 1 to 8 -> upright."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def to_channels_last(array: np.ndarray, num_channels: int) -> np.ndarray:
    """(H, W), (C, H, W) or (H, W, C) -> (H, W, C)."""
    banded, axes = (array[:, :, None], (2,)) if array.ndim == 2 else (array, (0, 2))
    axis = band_axis(banded.shape, (3, 1) if num_channels == 3 else (num_channels,), axes)
    if axis is None:
        raise wrong_channels(array.shape, num_channels)
    banded = np.moveaxis(banded, axis, -1)
    return np.broadcast_to(banded, (*banded.shape[:2], num_channels))


def wrong_channels(shape: Sequence[int], num_channels: int) -> BadImage:
    message = f"shape {tuple(shape)} has no axis of {num_channels} channels: set num_channels to the data's"
    return BadImage(message, "WrongChannels")


def bands_last(array: np.ndarray) -> np.ndarray:
    """(C, H, W) or (H, W, C) -> (H, W, C); C is the shorter one of the first and the last axis."""
    return np.moveaxis(array, 0, -1) if array.shape[0] <= array.shape[-1] else array


def to_native(array: np.ndarray) -> np.ndarray:
    """Convert to this machine's byte order, and booleans to 0 and 255."""
    if array.dtype.kind not in "buif":
        raise BadImage(f"the image holds {array.dtype}, which is not a number type", "WrongDtype")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array


def to_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """Convert to one of our dtypes. Integers are scaled between 8 and 16 bits, and never clipped."""
    array = to_native(array)
    if array.dtype.kind == "f" and dtype == "float32":
        with np.errstate(over="ignore"):  # a float64 that is too large becomes infinite
            array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).any():
            raise BadImage("every pixel is NaN or infinite", "NotFinite")
        return array
    if array.dtype.kind not in "ui":
        raise BadImage(f"the image holds {array.dtype}, which can't be converted to {dtype}", "WrongDtype")
    if dtype == "float32":
        return array.astype(np.float32)
    if array.dtype == np.uint8 and dtype == "uint16":
        return to_16_bits(array.astype(np.uint16))
    if array.dtype == np.uint16 and dtype == "uint8":
        return to_8_bits(array.astype(np.uint32)).astype(np.uint8)
    # Wider integers, such as the int64 of plain lists, are not scaled: their values already fit `dtype`, or are bad.
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > np.iinfo(dtype).max:
        raise BadImage(f"the image holds {array.dtype} from {low} to {high}, too wide for {dtype}", "WrongDtype")
    return array.astype(dtype)


def missing_as_nan(pixels: np.ndarray, nodata: float | None) -> np.ndarray:
    """`mark_missing` for an image; a BadImage if no pixel is left."""
    marked = mark_missing(pixels, nodata)
    if marked is not pixels and not np.isfinite(marked).any():
        raise BadImage(f"every pixel has the nodata value {nodata:g}", "NoData")
    return marked


def natural_dtype(array: np.ndarray) -> str:
    """Our dtype that keeps every value of images like this one; 16-bit data stays 16-bit, however small its values are.

    Signed and 32-bit integers are float32, although this image may have no value that needs it: others may. Only the
    64-bit integers of plain lists, which have no type of their own, are judged by their values.
    """
    array = to_native(array)
    if array.dtype in (np.uint8, np.uint16):
        return str(array.dtype)
    if array.dtype.kind == "f" or array.dtype.itemsize < 8 or int(array.min()) < 0 or int(array.max()) > 65_535:
        return "float32"
    return "uint8" if int(array.max()) <= 255 else "uint16"
