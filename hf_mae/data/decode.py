"""Bytes -> image. A broken or hostile file raises `BadImage`; it never crashes a run.

Pillow decodes every common format. One flipped bit can end the process in torchvision's decoders, but raises an
exception in Pillow, so torchvision is not used. simplejpeg (an extra) decodes JPEGs for training crops, with the same
bits and fewer copies; files that it rejects go to Pillow. numpy reads `.npy`. tifffile (an extra) reads TIFF files that
Pillow has no mode for: several bands, or colours of more than 8 bits.
"""

import contextlib
import io
import lzma
import math
import zlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import MissingPackage
from ..image_processing_base_mae import band_axis, to_8_bits, to_16_bits, to_opaque

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# Shape letters in this file
#   H, W pixels   C channels

DTYPES = ("uint8", "uint16", "float32")
MAX_SIDE = 65_535  # pixels; JPEG's limit
# Each scan of a progressive JPEG is one more decoding pass. Ten are usual, but a hundred bytes are enough for another.
MAX_JPEG_PASSES = 32  # for an image of the maximum size; smaller images may have more

# Only raster formats that start with their own magic bytes. This excludes EPS, for which Pillow runs Ghostscript,
# and formats such as TGA that accept nearly any bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
_JPEG_MAGIC = b"\xff\xd8\xff"
_NPY_MAGIC = b"\x93NUMPY"
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL, _TILE_WIDTH, _TILE_HEIGHT = 258, 277, 322, 323  # TIFF tags
# TIFF compressions (deflate under two numbers, LZMA) that tifffile expands fully, even beyond the size in the header,
# with the maximum number of bytes that one compressed byte can become.
_DEFLATE, _LZMA = (zlib.decompressobj, 1032), (lzma.LZMADecompressor, math.inf)
_EXPANDERS: dict[int, Any] = {8: _DEFLATE, 32946: _DEFLATE, 34925: _LZMA}
_HARMLESS = 2**28  # bytes
_PACKBITS = 32773  # also expanded fully, and slowly, if the package imagecodecs is not installed


class BadImage(ValueError):
    """A sample that can't be used. A run counts it and skips it.

    Attributes:
        reason: class name of the decoder's exception, or one of our own words: `EmptyFile`, `TooManyPixels`,
            `TooManyScans`, `WrongChannels`, `WrongDtype`, `NotFinite`, `NeedsImagecodecs`; or, if the source can't
            give the row's image: `NoBytes`, `RaggedArray`, `CorruptRowGroup`, `TruncatedTar`.
    """

    def __init__(self, message: str, reason: str = "BadImage"):
        super().__init__(message)
        self.reason = reason


BadSample = tuple[str, str]  # the key of a row that can't be used, and the reason


def decode_image(
    data: bytes | np.ndarray | BadImage, num_channels: int, dtype: str = "uint8", min_pixels: int | None = None
) -> Image.Image | np.ndarray:
    """Decode one sample: an encoded file or an array.

    Encoded images are converted between grey and colour as by `PIL.Image.convert`. Transparency is composited on white,
    as in our image processors. An animation gives its first frame, and EXIF orientation is not applied, as in
    torchvision's ImageFolder. Integers are scaled between 8 and 16 bits (by 257), never clipped.

    Args:
        data: the file's bytes, or an array (H, W), (C, H, W) or (H, W, C). The channel axis is the one with
            `num_channels` entries; if both the first and the last have this many, it is the first. If the source
            can't read the image, `data` is its `BadImage`, which is raised.
        num_channels: number of channels of the result. A one-band array is repeated for 3.
        dtype: `uint8` in [0, 255], `uint16` in [0, 65535], or `float32` with the values of the file.
        min_pixels: a JPEG may be decoded with its sides reduced to 1/2, 1/4 or 1/8 if this many pixels remain, and may
            be returned as an array. Decoded at full size when omitted.

    Returns:
        A PIL image of mode `L` or `RGB` for uint8 with 1 or 3 channels, else an array (H, W, C) of `dtype`.

    Raises:
        BadImage: if the data can't be used, for any reason.
        MissingPackage: if tifffile is needed and not installed.
        ValueError: if `dtype` is not one of the three.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")
    with as_bad_image():
        if min_pixels is not None and dtype == "uint8" and isinstance(data, bytes) and data.startswith(_JPEG_MAGIC):
            pixels = _decode_fast(data, num_channels, min_pixels)
            if pixels is not None:
                return pixels
        image = _read(data, num_channels)
        if isinstance(image, np.ndarray):
            return _from_array(image, num_channels, dtype)
        if min_pixels is not None:
            factor = _factor(image.width, image.height, min_pixels)
            image.draft(None, (image.width // factor, image.height // factor))  # only affects JPEG
        return _from_pil(image, num_channels, dtype)


def load_image(data: bytes | np.ndarray | BadImage, least: int) -> Image.Image | np.ndarray:
    """Decode one sample as it is stored: a PIL image of any mode or an array of any shape.

    A JPEG may be decoded with its sides reduced to 1/2, 1/4 or 1/8 if the shorter one keeps `least` pixels. `data` and
    errors are those of `decode_image`.
    """
    with as_bad_image():
        image = _read(data, None)
        if isinstance(image, Image.Image):
            factor = next((f for f in (8, 4, 2) if min(image.size) // f >= least), 1)
            image.draft(None, (image.width // factor, image.height // factor))
            image.load()
        return image


def probe_image(data: bytes | np.ndarray | BadImage) -> tuple[int, str]:
    """The `num_channels` and `dtype` that fit a sample; `data` and errors are those of `decode_image`.

    Every colour or palette image that Pillow reads has 3 channels, with or without transparency; those of an array are
    found by `bands_last`. For most files, only the header is read.
    """
    with as_bad_image():
        image = _read(data, None)
        if isinstance(image, np.ndarray):
            return 1 if image.ndim == 2 else bands_last(image).shape[-1], _natural_dtype(image)
        if image.mode in ("1", "L"):
            return 1, "uint8"
        if image.mode == "F":
            return 1, "float32"
        return (1, "uint16") if image.mode.startswith("I") else (3, "uint8")


@contextlib.contextmanager
def as_bad_image() -> Iterator[None]:
    """Turn every exception of a decoder into a BadImage: no decoder documents which ones it raises."""
    try:
        yield
    except (BadImage, MissingPackage):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(str(error), "TooManyPixels") from error
    except UnidentifiedImageError as error:  # its message only names an object in memory
        raise BadImage("it is not an image of a known kind", type(error).__name__) from error
    except Exception as error:  # MemoryError and RecursionError included
        raise BadImage(f"{type(error).__name__}: {error}", type(error).__name__) from error


def _read(data: bytes | np.ndarray | BadImage, num_channels: int | None) -> Image.Image | np.ndarray:
    """Check a sample's size and open it; Pillow decodes later. `num_channels` is None if it is not known yet."""
    if isinstance(data, BadImage):
        raise BadImage(str(data), data.reason)  # a new one: rows may share `data`, and a raised one keeps its frames
    if isinstance(data, np.ndarray):
        _check_shape(data.shape, num_channels)
        return data
    if not data:
        raise BadImage("the file is empty", "EmptyFile")
    if data.startswith(_NPY_MAGIC):
        return _read_npy(data, num_channels)
    if data.startswith(_TIFF_MAGIC):
        return _read_tiff(data, num_channels)
    return _open_with_pillow(data, _FORMATS)


def _open_with_pillow(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=formats)
    _check_size(image.width, image.height, data)
    return image


def _check_size(width: int, height: int, data: bytes) -> None:
    """Refuse a file before it is decoded, from the size that its header claims."""
    limit = Image.MAX_IMAGE_PIXELS  # a user of huge images may have raised it
    if max(width, height) > MAX_SIDE or (limit is not None and width * height > limit):
        raise BadImage(f"{width} x {height} pixels; limits: {limit} in total, {MAX_SIDE} per side", "TooManyPixels")
    if data.startswith(_JPEG_MAGIC) and limit is not None:
        scans = MAX_JPEG_PASSES * limit // (width * height)
        # A scan has at least ten bytes, so most files are too short to need counting.
        if len(data) > 10 * scans and data.count(b"\xff\xda") > scans:
            raise BadImage(f"more than {scans} scans of {width} x {height} pixels", "TooManyScans")


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
        _check_size(width, height, data)
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


def _check_shape(shape: Sequence[int], num_channels: int | None) -> None:
    """Refuse an array before it is decoded, from the shape that its header claims."""
    if len(shape) not in (2, 3):
        raise BadImage(f"shape {tuple(shape)} is not the shape of one image", "WrongChannels")
    if min(shape) < 1:
        raise BadImage(f"shape {tuple(shape)} has no pixels", "EmptyFile")
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    height, width = sorted(shape)[-2:]
    # Limits memory: a few kilobytes of compressed TIFF may claim thousands of bands.
    too_deep = math.prod(shape) > limit * max(num_channels or 64, 4)
    if max(shape) > MAX_SIDE or height * width > limit or too_deep:
        raise BadImage(f"shape {tuple(shape)} is too large; the limit is {limit} pixels", "TooManyPixels")


def _read_npy(data: bytes, num_channels: int | None) -> np.ndarray:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = header(stream)
    _check_shape(shape, num_channels)
    # Not np.load: it allocates what the header claims before it notices that the file is shorter.
    array = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
    return array.reshape(shape, order="F" if fortran_order else "C")


def _read_tiff(data: bytes, num_channels: int | None) -> Image.Image | np.ndarray:
    """Open with Pillow if it decodes the file without loss, else read with tifffile."""
    if num_channels not in (None, 1, 3):
        return _read_with_tifffile(data, num_channels)
    try:
        image: Any = _open_with_pillow(data, ("TIFF",))
    except UnidentifiedImageError:  # Pillow also raises it for a band count that it has no mode for
        return _read_with_tifffile(data, num_channels)
    # Pillow allocates a whole tile, however small the image is.
    _check_shape((image.tag_v2.get(_TILE_HEIGHT, 1), image.tag_v2.get(_TILE_WIDTH, 1)), num_channels)
    bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    bands = image.tag_v2.get(_SAMPLES_PER_PIXEL, 1)
    if bands == 1:
        # A stack of one-band pages is one image with many bands, unless another number of channels is wanted.
        frames = _count_frames(image, 4)
        is_stack = frames > 1 and num_channels in (None, frames)
        return _read_with_tifffile(data, num_channels) if is_stack else image
    return image if bits <= 8 and bands <= 4 else _read_with_tifffile(data, num_channels)


def _count_frames(image: Image.Image, most: int) -> int:
    """Number of frames, counted up to `most`: the time of Pillow's own count grows with the square of the number."""
    frames = 1
    with contextlib.suppress(EOFError):
        while frames < most:
            image.seek(frames)
            frames += 1
    image.seek(0)
    return frames


def _read_with_tifffile(data: bytes, num_channels: int | None) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        message = "TIFF files of several bands or more than 8 bits need tifffile: pip install tifffile"
        raise MissingPackage(message) from error
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        series = tiff.series[0]
        _check_shape(series.shape, num_channels)
        for page in filter(None, series.pages):
            _check_segments(data, page, num_channels)
        try:
            return series.asarray(maxworkers=1)
        except ValueError as error:
            # Only this file is bad, since one flipped bit can turn one compression into another.
            if "imagecodecs" in str(error):
                raise BadImage(f"{error}: pip install imagecodecs", "NeedsImagecodecs") from error
            raise


def _check_segments(data: bytes, page: Any, num_channels: int | None) -> None:
    """Refuse a page (of tifffile) whose strips or tiles are too large, or expand to far more than their size."""
    _check_shape(page.chunks, num_channels)
    if page.compression == _PACKBITS and find_spec("imagecodecs") is None:
        raise BadImage("PackBits needs the package imagecodecs: pip install imagecodecs", "NeedsImagecodecs")
    if page.compression not in _EXPANDERS:
        return
    most = 2 * math.prod(page.chunks) * page.dtype.itemsize + 2**16
    expander, ratio = _EXPANDERS[page.compression]
    for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        # Most strips and tiles are too small to expand to much, so they are not expanded here.
        if size * ratio > _HARMLESS and len(expander().decompress(data[offset : offset + size], most)) == most:
            raise BadImage(f"a part of {page.chunks} pixels expands to {most} bytes or more", "TooManyPixels")


def _from_pil(image: Image.Image, num_channels: int, dtype: str) -> Image.Image | np.ndarray:
    if image.mode == "F" or image.mode.startswith("I"):
        array = np.asarray(image)
        if image.mode == "I" and dtype != "float32":
            # Pillow gives 32 bits for 16-bit files that it has no 16-bit mode for.
            array = _to_dtype(array, "uint16")
        return _from_array(array, num_channels, dtype)
    image.load()
    if dtype == "uint8" and image.mode == {1: "L", 3: "RGB"}.get(num_channels) and not image.has_transparency_data:
        return image
    if num_channels in (1, 3):
        # Pillow's own conversion clips 16-bit grey to 255, so those modes have already returned.
        image = to_opaque(image, num_channels)
        return image if dtype == "uint8" else _from_array(np.asarray(image), num_channels, dtype)
    return _from_array(np.asarray(image), num_channels, dtype)


def _from_array(array: np.ndarray, num_channels: int, dtype: str) -> Image.Image | np.ndarray:
    array = _to_dtype(_to_channels_last(array, num_channels), dtype)
    if dtype == "uint8" and num_channels in (1, 3):
        return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if num_channels == 1 else array))
    return np.array(array)  # a copy is writable and in memory; the array may be a view of a mapped file


def _to_channels_last(array: np.ndarray, num_channels: int) -> np.ndarray:
    """(H, W), (C, H, W) or (H, W, C) -> (H, W, C)."""
    banded, axes = (array[:, :, None], (2,)) if array.ndim == 2 else (array, (0, 2))
    axis = band_axis(banded.shape, (3, 1) if num_channels == 3 else (num_channels,), axes)
    if axis is None:
        message = f"shape {array.shape} has no axis of {num_channels} channels: set num_channels to the data's"
        raise BadImage(message, "WrongChannels")
    banded = np.moveaxis(banded, axis, -1)
    return np.broadcast_to(banded, (*banded.shape[:2], num_channels))


def bands_last(array: np.ndarray) -> np.ndarray:
    """(C, H, W) or (H, W, C) -> (H, W, C); C is the shorter one of the first and the last axis."""
    return np.moveaxis(array, 0, -1) if array.shape[0] <= array.shape[-1] else array


def to_native(array: np.ndarray) -> np.ndarray:
    """Convert to this machine's byte order, and booleans to 0 and 255."""
    if array.dtype.kind not in "buif":
        raise BadImage(f"the image holds {array.dtype}, which is not a number type", "WrongDtype")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array


def _to_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    array = to_native(array)
    if array.dtype.kind == "f" and dtype == "float32":
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise BadImage("the image has values that are not finite numbers", "NotFinite")
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


def _natural_dtype(array: np.ndarray) -> str:
    """The smallest of our dtypes that keeps every value; 16-bit data stays 16-bit, however small its values are."""
    array = to_native(array)
    if array.dtype.kind == "f" or int(array.min()) < 0 or int(array.max()) > 65_535:
        return "float32"
    return "uint8" if int(array.max()) <= 255 and array.dtype != np.uint16 else "uint16"
