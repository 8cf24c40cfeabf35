"""Bytes -> image. A broken or hostile file raises `BadImage`; it never crashes a run.

    limits.py      what is refused before it is decoded
    pictures.py    what Pillow opens: upright, 16 bits of colour, transparency
    tiff.py        TIFF files: several bands, pages, kinds of numbers that Pillow lacks
    bands.py       arrays: channels and dtypes

Pillow decodes every common format. One flipped bit can end the process in torchvision's decoders, but raises an
exception in Pillow, so torchvision is not used. simplejpeg (an extra) decodes JPEGs for training crops, with the same
bits and fewer copies; files that it rejects go to Pillow. numpy reads `.npy`. tifffile (an extra) reads TIFF files that
Pillow has no mode for.
"""

import io
import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .bands import Bands, bands_last, missing_as_nan, natural_dtype, to_channels_last, to_dtype, to_native
from .limits import JPEG_MAGIC, BadImage, BadSample, as_bad_image, check_shape, check_size
from .pictures import deep_reader, open_picture, orientation, picture_gives, upright, upright_size, with_channels
from .tiff import MAGIC as TIFF_MAGIC
from .tiff import read_tiff

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# Shape letters in this file
#   H, W pixels   C channels

__all__ = [
    "DTYPES",
    "BadImage",
    "BadSample",
    "as_bad_image",
    "decode_image",
    "load_image",
    "probe_image",
    "probe_sample",
]
DTYPES = ("uint8", "uint16", "float32")
_NPY_MAGIC = b"\x93NUMPY"


def decode_image(
    data: bytes | np.ndarray | BadImage,
    num_channels: int,
    dtype: str = "uint8",
    min_pixels: int | None = None,
    nodata: float | None = None,
) -> Image.Image | np.ndarray:
    """Decode one sample: an encoded file or an array.

    Images are upright, as their EXIF orientation says. Encoded images are converted between grey and colour as by
    `PIL.Image.convert`. Transparency is composited on white, as in our image processors, or is the fourth of four
    channels. An animation gives its first frame. Integers are scaled between 8 and 16 bits (by 257), never clipped.

    Args:
        data: the file's bytes, or an array (H, W), (C, H, W) or (H, W, C). The channel axis is the one with
            `num_channels` entries; if both the first and the last have this many, it is the first. If the source
            can't read the image, `data` is its `BadImage`, which is raised.
        num_channels: number of channels of the result. A one-band array is repeated for 3.
        dtype: `uint8` in [0, 255], `uint16` in [0, 65535], or `float32` with the values of the file, NaN included.
        min_pixels: a JPEG may be decoded with its sides reduced to 1/2, 1/4 or 1/8 if this many pixels remain, and may
            be returned as an array. Decoded at full size when omitted.
        nodata: value, in the unit of `dtype`, that stands for a missing pixel. JPEGs are decoded at full size then, so
            that nothing is blended with it.

    Returns:
        A PIL image of mode `L` or `RGB` for uint8 with 1 or 3 channels, else an array (H, W, C) of `dtype`. If pixels
        have the value `nodata`, an array of float32 with NaN in its place, for every `dtype`.

    Raises:
        BadImage: if the data can't be used, for any reason.
        MissingPackage: if tifffile is needed and not installed.
        ValueError: if `dtype` is not one of the three.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")
    with as_bad_image():
        if nodata is None:
            return _decode(data, num_channels, dtype, min_pixels)
        return _with_missing(_decode(data, num_channels, dtype, None), nodata)


def load_image(data: bytes | np.ndarray | BadImage, least: int) -> Image.Image | np.ndarray | Bands:
    """Decode one sample as it is stored, but upright: a PIL image of any mode, an array of any shape, or `Bands`.

    A JPEG may be decoded with its sides reduced to 1/2, 1/4 or 1/8 if the shorter one keeps `least` pixels. `data` and
    errors are those of `decode_image`.
    """
    with as_bad_image():
        image = _read(data, None)
        if isinstance(image, Image.Image):
            factor = next((f for f in (8, 4, 2) if min(image.size) // f >= least), 1)
            image.draft(None, (image.width // factor, image.height // factor))
            return _decoded(image)
        return image


class Sample(NamedTuple):
    """What an image is like: `num_channels` and `dtype` fit it; `channels` it has; `size` is its height and width."""

    num_channels: int
    dtype: str
    channels: int
    size: tuple[int, int]


def probe_image(data: bytes | np.ndarray | BadImage, num_channels: int | None = None) -> tuple[int, str]:
    """The `num_channels` and `dtype` that fit a sample, see `probe_sample`."""
    return probe_sample(data, num_channels)[:2]


def probe_sample(data: bytes | np.ndarray | BadImage, num_channels: int | None = None) -> Sample:
    """Look at a sample; for most files, only the header is read. `data` and errors are those of `decode_image`.

    Every colour or palette image that Pillow reads has 3 channels, with or without transparency; those of an array are
    found by `bands_last`. The given `num_channels` fits a sample that can be decoded to it.
    """
    with as_bad_image():
        image = _read(data, num_channels)
        if isinstance(image, np.ndarray):
            height, width, channels = (image[:, :, None] if image.ndim == 2 else bands_last(image)).shape
            return Sample(channels, natural_dtype(image), channels, (height, width))
        if isinstance(image, Bands):
            height, width, _ = image.pixels.shape
            found = num_channels if num_channels and image.gives(num_channels) else image.num_channels
            return Sample(found, natural_dtype(image.pixels), image.num_channels, (height, width))
        gray = image.mode in ("1", "L", "F") or image.mode.startswith("I")
        channels = 1 if gray else 3
        found = num_channels if num_channels and picture_gives(image, num_channels) else channels
        deep = image.mode.startswith("I") or deep_reader(image) is not None
        dtype = "float32" if image.mode == "F" else "uint16" if deep else "uint8"
        return Sample(found, dtype, channels, upright_size(image))


def _decode(
    data: bytes | np.ndarray | BadImage, num_channels: int, dtype: str, min_pixels: int | None
) -> Image.Image | np.ndarray:
    if min_pixels is not None and dtype == "uint8" and isinstance(data, bytes) and data.startswith(JPEG_MAGIC):
        pixels = _decode_fast(data, num_channels, min_pixels)
        if pixels is not None:
            return pixels
    image = _read(data, num_channels)
    if isinstance(image, Image.Image):
        if min_pixels is not None:
            factor = _factor(image.width, image.height, min_pixels)
            image.draft(None, (image.width // factor, image.height // factor))  # only affects JPEG
        image = _decoded(image)
    if isinstance(image, Image.Image):
        return _from_pil(image, num_channels, dtype)
    if isinstance(image, Bands):
        return _from_bands(image, num_channels, dtype)
    return _converted(to_channels_last(image, num_channels), dtype)


def _with_missing(image: Image.Image | np.ndarray, nodata: float) -> Image.Image | np.ndarray:
    pixels = np.asarray(image)
    marked = missing_as_nan(pixels, nodata)
    if marked is pixels:
        return image
    return marked if marked.ndim == 3 else marked[:, :, None]


def _decoded(image: Image.Image) -> Image.Image | Bands:
    """Decode an opened image, at full depth and upright."""
    reader = deep_reader(image)
    return upright(image) if reader is None else reader()


def _read(data: bytes | np.ndarray | BadImage, num_channels: int | None) -> Any:
    """Check a sample's size and open it: an image that Pillow decodes later, an array as it is stored, or `Bands`.

    `num_channels` is None if it is not known yet.
    """
    if isinstance(data, BadImage):
        raise BadImage(str(data), data.reason)  # a new one: rows may share `data`, and a raised one keeps its frames
    if isinstance(data, np.ndarray):
        check_shape(data.shape, num_channels)
        return data
    if not data:
        raise BadImage("the file is empty", "EmptyFile")
    if data.startswith(_NPY_MAGIC):
        return _read_npy(data, num_channels)
    if data.startswith(TIFF_MAGIC):
        return read_tiff(data, num_channels)
    return open_picture(data)


def _decode_fast(data: bytes, num_channels: int, min_pixels: int) -> np.ndarray | None:
    """Decode a JPEG with simplejpeg, (H, W, C) uint8; None if Pillow has to decode it or report what is wrong."""
    if simplejpeg is None:
        return None
    try:
        header: Any = simplejpeg.decode_jpeg_header(data)
        height, width, color, _ = header
        colorspace = {("YCbCr", 3): "RGB", ("Gray", 3): "RGB", ("Gray", 1): "GRAY"}.get((color, num_channels))
        if colorspace is None:
            return None
        check_size(width, height, data)
        # Pillow is faster at turning an image. Most files have no metadata, and opening others takes 0.1 ms.
        if (b"Exif\0\0" in data or b"tiff:Orientation" in data) and orientation(open_picture(data)) != 1:
            return None
        factor = _factor(width, height, min_pixels)
        least = {"min_height": height // factor, "min_width": width // factor}
        # strict turns libjpeg's warnings into errors.
        return simplejpeg.decode_jpeg(data, colorspace, **least, strict=True)
    except BadImage:
        raise
    except ValueError:
        return None


def _factor(width: int, height: int, min_pixels: int) -> int:
    """The largest of 8, 4, 2 and 1 that the sides of a JPEG can be divided by so that it keeps `min_pixels`."""
    return next((f for f in (8, 4, 2) if (width // f) * (height // f) >= min_pixels), 1)


def _read_npy(data: bytes, num_channels: int | None) -> np.ndarray:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = header(stream)
    check_shape(shape, num_channels)
    # Not np.load: it allocates what the header claims before it notices that the file is shorter.
    array = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
    return array.reshape(shape, order="F" if fortran_order else "C")


def _from_pil(image: Image.Image, num_channels: int, dtype: str) -> Image.Image | np.ndarray:
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image)
        if image.mode == "I":  # Pillow gives 32 bits for 16-bit files that it has no 16-bit mode for
            pixels = pixels.astype(np.uint16)
        return _from_bands(Bands(pixels[:, :, None]), num_channels, dtype)
    converted = with_channels(image, num_channels)
    if isinstance(converted, Image.Image) and dtype == "uint8":
        return converted
    pixels = np.asarray(converted)
    return _converted(pixels if pixels.ndim == 3 else pixels[:, :, None], dtype)


def _from_bands(image: Bands, num_channels: int, dtype: str) -> Image.Image | np.ndarray:
    """One band of wider integers is taken for 16 bits if it fits, as by our image processors."""
    pixels = to_native(image.with_channels(num_channels))
    wide = image.pixels.shape[-1] == 1 and pixels.dtype.kind in "iu" and pixels.dtype.itemsize > 2
    if wide and dtype != "float32" and 0 <= int(pixels.min()) <= int(pixels.max()) <= 65_535:
        pixels = pixels.astype(np.uint16)
    return _converted(pixels, dtype)


def _converted(pixels: np.ndarray, dtype: str) -> Image.Image | np.ndarray:
    """(H, W, C) -> what `decode_image` returns."""
    pixels = to_dtype(pixels, dtype)
    if dtype == "uint8" and pixels.shape[-1] in (1, 3):
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels))
    return np.array(pixels)  # a copy is writable and in memory; the array may be a view of a mapped file
