"""TIFF files: by Pillow where it decodes them without loss, else by tifffile.

Shape letters in this file
    H, W pixels   C channels
"""

import io
import lzma
import math
import struct
import sys
import zlib
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from ..errors import MissingPackage
from .bands import Bands, turned
from .limits import BadImage, check_shape
from .pictures import decoded_as, from_halves, open_picture

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_PAGES = 512  # that may be the bands of one image, unless the file says that they are one array
# Tags
_BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _PLANAR = 258, 262, 274, 277, 284
_TILE_WIDTH, _TILE_HEIGHT, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 322, 323, 338, 339
_RGB, _UNSIGNED, _SEPARATE = 2, 1, 2  # values of photometric, sample format and planar configuration
_UNSPECIFIED, _PREMULTIPLIED, _STRAIGHT = 0, 1, 2  # kinds of extra samples; the last two are alpha
# TIFF compressions (deflate under two numbers, LZMA) that tifffile expands fully, even beyond the size in the header,
# with the maximum number of bytes that one compressed byte can become.
_DEFLATE, _LZMA = (zlib.decompressobj, 1032), (lzma.LZMADecompressor, math.inf)
_EXPANDERS: dict[int, Any] = {8: _DEFLATE, 32946: _DEFLATE, 34925: _LZMA}
_HARMLESS = 2**28  # bytes
_PACKBITS = 32773  # also expanded fully, and slowly, if the package imagecodecs is not installed


def read_tiff(data: bytes, num_channels: int | None) -> Any:
    """Open a file: an image of Pillow's, not decoded yet; or `Bands`; or, for a stack of pages, an array of three axes.

    The first page is the image. But if `num_channels` is neither 1 nor 3, or unknown, pages of one band are the bands
    of one image.
    """
    pages = _count_pages(data, max(MAX_PAGES, num_channels or 0) + 1)
    try:
        image: Any = open_picture(data, ("TIFF",))
    except UnidentifiedImageError:  # Pillow also raises it for a band count that it has no mode for
        return _read_with_tifffile(data, num_channels, pages)
    # Pillow allocates a whole tile, however small the image is.
    check_shape((image.tag_v2.get(_TILE_HEIGHT, 1), image.tag_v2.get(_TILE_WIDTH, 1)), num_channels)
    if not _is_stack(image.tag_v2.get(_SAMPLES, 1), pages, num_channels) and _is_kept_by_pillow(image, num_channels):
        return image
    try:
        return _read_with_tifffile(data, num_channels, pages)
    except BadImage as error:
        bands = _read_with_libtiff(image, data) if error.reason == "NeedsImagecodecs" else None
        if bands is None:
            raise
        return bands


def _count_pages(data: bytes, most: int) -> int:
    """Number of pages, counted up to `most`. Several pages whose chain leads back into itself count as `most`."""
    order, big = "<" if data.startswith(b"II") else ">", data[2:4] in (b"+\0", b"\0+")
    offset, count, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
    at, starts = 8 if big else 4, set()
    try:
        while len(starts) < most:
            (start,) = struct.unpack_from(order + offset, data, at)
            if start in starts and len(starts) > 1:
                return most
            if not start or start in starts:
                break
            (entries,) = struct.unpack_from(order + count, data, start)
            starts.add(start)
            at = start + struct.calcsize(order + count) + entries * entry
    except struct.error:  # the next page is said to lie beyond the file
        pass
    return len(starts)


def _is_stack(samples: int, pages: int, num_channels: int | None) -> bool:
    """Whether pages are the bands of one image: pages of one band, unless another number of channels is wanted."""
    return samples == 1 and pages > 1 and (num_channels not in (1, 3) or num_channels == pages)


def _is_kept_by_pillow(image: Any, num_channels: int | None) -> bool:
    tags = image.tag_v2
    unsigned = set(tags.get(_SAMPLE_FORMAT, (1,))) == {_UNSIGNED}
    bits, samples = max(tags.get(_BITS, (1,))), tags.get(_SAMPLES, 1)
    if samples == 1:
        # Pillow swaps the bytes of compressed big-endian numbers of other kinds, and takes int8 for uint8.
        return unsigned and bits <= 16
    # Pillow drops the fourth band if nothing says that it is transparency.
    whole = samples <= 3 or image.mode in ("RGBA", "CMYK") or num_channels in (1, 3)
    return unsigned and bits <= 8 and samples <= 4 and whole and num_channels in (None, 1, 3, 4)


def _read_with_tifffile(data: bytes, num_channels: int | None, pages: int) -> Bands | np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        message = "TIFF files of several bands or more than 8 bits need tifffile: pip install tifffile"
        raise MissingPackage(message) from error
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages.first
        stack = _is_stack(page.samplesperpixel, pages, num_channels)
        found: Any = _stack(tiff, pages, num_channels) if stack else page
        check_shape(found.shape, num_channels)
        contiguous = not stack or found.dataoffset is not None
        for part in [page] if contiguous else filter(None, found.pages):
            _check_segments(data, part, num_channels)
        try:
            array = found.asarray(maxworkers=1)
        except ValueError as error:
            # Only this file is bad, since one flipped bit can turn one compression into another.
            if "imagecodecs" in str(error):
                raise BadImage(f"{error}: pip install imagecodecs", "NeedsImagecodecs") from error
            raise
        if stack:
            return array
        if array.ndim == 2:
            array = array[:, :, None]
        elif page.planarconfig == _SEPARATE:
            array = np.moveaxis(array, 0, -1)
        extra = [int(kind) for kind in page.extrasamples]
        array = turned(array, page.tags.valueof(_ORIENTATION, default=1))
        return _bands(array, int(page.photometric) == _RGB, extra)


def _stack(tiff: Any, pages: int, num_channels: int | None) -> Any:
    """The pages as one image; each costs a millisecond, unless the file says that all are one array without gaps."""
    few = pages <= max(MAX_PAGES, num_channels or 0)
    if few or tiff.is_shaped or tiff.is_imagej:
        series = tiff.series[0]
        if few or series.dataoffset is not None:
            return series
    message = f"more than {MAX_PAGES} pages, or pages in a circle; with --num_channels 1, only the first is read"
    raise BadImage(message, "TooManyPages")


def _bands(pixels: np.ndarray, is_rgb: bool, extra: list[int]) -> Bands:
    """Describe the bands by the photometric interpretation and the kinds of the extra samples."""
    if extra and extra[-1] == _PREMULTIPLIED and pixels.dtype.kind == "u":
        alpha, most = pixels[:, :, -1:].astype(np.float64), np.iinfo(pixels.dtype).max
        straight = np.rint(pixels[:, :, :-1] * (most / np.maximum(alpha, 1))).clip(0, most)
        pixels = np.concatenate([straight, alpha], axis=-1).astype(pixels.dtype)
    return Bands(pixels, is_rgb and pixels.shape[-1] >= 3, bool(extra) and extra[-1] in (_PREMULTIPLIED, _STRAIGHT))


def _check_segments(data: bytes, page: Any, num_channels: int | None) -> None:
    """Refuse a page (of tifffile) whose strips or tiles are too large, or expand to far more than their size."""
    check_shape(page.chunks, num_channels)
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


def _read_with_libtiff(image: Any, data: bytes) -> Bands | None:
    """Decode by Pillow's libtiff what tifffile has no decoder for, with all bits and bands; None if that can't be done.

    libtiff gives numbers in this machine's byte order. Pillow's raw modes of 16 bits keep one byte of two: L the
    second, B the first.
    """
    tags = image.tag_v2
    bits, samples = set(tags.get(_BITS, (1,))), tags.get(_SAMPLES, 1)
    mode, extra = {3: "RGB", 4: "RGBA"}.get(samples), list(tags.get(_EXTRA_SAMPLES, ()))
    if samples == 1 and image.mode in ("L", "I", "F"):
        signed = tags.get(_SAMPLE_FORMAT, (1,))[0] != _UNSIGNED
        native = {("L", 8): "L", ("I", 16): "I;16NS", ("I", 32): "I;32NS", ("F", 32): "F;32NF"}
        rawmode = native.get((image.mode, max(bits)))
        if rawmode is None:
            return None
        pixels = np.asarray(decoded_as(data, "TIFF", rawmode))[:, :, None]
        dtype = {"L": np.int8 if signed else np.uint8, "I": np.int32 if signed else np.uint32, "F": np.float32}
        return Bands(pixels.view(dtype[image.mode]))
    if mode is None or tags.get(_PHOTOMETRIC) not in (_RGB, 5):
        return None
    if bits == {8}:
        pixels = np.asarray(decoded_as(data, "TIFF", mode, mode))
    elif bits == {16} and tags.get(_PLANAR) != _SEPARATE:
        high, low = "LB" if sys.byteorder == "little" else "BL"
        pixels = from_halves(*(decoded_as(data, "TIFF", f"{mode};16{byte}", mode) for byte in (high, low)))
    else:
        return None
    return _bands(pixels, tags[_PHOTOMETRIC] == _RGB, extra)
