"""Files that Pillow opens: upright, at their own bit depth, with or without transparency.

Pillow has no colour mode of 16 bits. What it reads as the high bytes alone is read here at full depth.

Shape letters in this file
    H, W pixels   C channels
"""

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ..image_processing_base_mae import to_opaque
from .bands import Bands, turned, wrong_channels
from .limits import BadImage, check_size

# Only raster formats that start with their own magic bytes. This excludes EPS, for which Pillow runs Ghostscript,
# and formats such as TGA that accept nearly any bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
# Writers of these leave out transparency where an image has none, so a set of RGBA images may hold some as RGB.
_MAY_OMIT_ALPHA = ("PNG", "WEBP", "GIF", "AVIF")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_IN = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # keys of `Image.info`


def open_picture(data: bytes, formats: tuple[str, ...] = FORMATS) -> Any:
    """Open a file and check its size; Pillow decodes later."""
    image = Image.open(io.BytesIO(data), formats=formats)
    check_size(image.width, image.height, data)
    return image


def orientation(image: Image.Image) -> int:
    """The orientation in an image's EXIF or XMP data, from 1 to 8. In a PNG they may come after the pixels."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow documents none; the pixels are fine
        return 1
    return int(found) if found in _UPRIGHT else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an opened image after `upright`. A PNG's orientation isn't looked for: it decodes the file."""
    on_its_side = image.format != "PNG" and orientation(image) >= 5
    return (image.width, image.height) if on_its_side else (image.height, image.width)


def upright(image: Image.Image) -> Image.Image:
    """Decode an image and turn it as its orientation says. The result has none, so nothing turns it again."""
    image.load()
    found = orientation(image)
    if found == 1:
        return image
    result = image.transpose(_UPRIGHT[found])
    result.format = image.format
    for key in _ORIENTATION_IN:
        result.info.pop(key, None)
    return result


def picture_gives(image: Image.Image, num_channels: int) -> bool:
    """Whether an image has this number of channels, or can be converted to it without inventing one."""
    if num_channels == 4:
        return image.mode == "CMYK" or (image.has_transparency_data and not image.mode.startswith("I"))
    return num_channels in (1, 3)


def with_channels(image: Image.Image, num_channels: int) -> Image.Image | np.ndarray:
    """An 8-bit image in mode L or RGB for 1 or 3 channels, else (H, W, C). Four channels keep the transparency."""
    if image.mode == {1: "L", 3: "RGB"}.get(num_channels) and not image.has_transparency_data:
        return image
    if num_channels in (1, 3):
        return to_opaque(image, num_channels)
    if num_channels != 4 or not (picture_gives(image, 4) or image.format in _MAY_OMIT_ALPHA):
        raise wrong_channels((image.height, image.width, len(image.getbands())), num_channels)
    return np.asarray(image if image.mode == "CMYK" else image.convert("RGBA"))


# ------------------------------------------------------------------------------------------ 16 bits


def deep_reader(image: Any) -> Callable[[], Bands] | None:
    """A function that decodes an opened colour image of more than 8 bits; None for images that Pillow keeps whole."""
    if image.format not in ("PNG", "PPM", "JPEG2000"):
        return None
    data = image.fp.getvalue()
    if image.format == "PNG" and image.mode != "I;16" and str(image.tile[0].args).endswith(";16B"):
        return lambda: _read_png(image, data)
    if image.format == "PPM" and image.mode == "RGB" and _ppm_maximum(image) > 255:
        return lambda: _read_ppm(image, data)
    if image.format == "JPEG2000" and image.mode in ("LA", "RGB", "RGBA") and _jpeg2000_bits(data) > 8:
        return lambda: _read_jpeg2000(data, image.mode)
    return None


def decoded_as(data: bytes, format: str, rawmode: str, mode: str | None = None) -> Image.Image:
    """Decode with another of Pillow's raw modes, which say what the bytes of a pixel mean, and perhaps another mode."""
    image: Any = Image.open(io.BytesIO(data), formats=(format,))
    image._mode = mode or image.mode
    tile = image.tile[0]
    image.tile = [tile._replace(args=rawmode if isinstance(tile.args, str) else (rawmode, *tile.args[1:]))]
    image.load()
    return image


def from_halves(high: Image.Image, low: Image.Image) -> np.ndarray:
    """(H, W, C) uint16 of the high and the low bytes of the same pixels."""
    return np.asarray(high).astype(np.uint16) << 8 | np.asarray(low)


def _read_png(image: Any, data: bytes) -> Bands:
    # PNG stores the high byte first. Pillow's raw modes of 16 bits keep one byte of two: B the first, L the second.
    kind = image.tile[0].args.removesuffix(";16B")
    high = decoded_as(data, "PNG", "RGBA" if kind == "LA" else image.tile[0].args)
    if kind == "LA":
        pixels = np.asarray(high).view(">u2").astype(np.uint16)
    else:
        pixels = from_halves(high, decoded_as(data, "PNG", f"{kind};16L"))
    transparent = image.info.get("transparency")
    if kind == "RGB" and transparent is not None:
        alpha = np.where((pixels == transparent).all(axis=-1, keepdims=True), 0, 65_535)
        pixels = np.concatenate([pixels, alpha.astype(np.uint16)], axis=-1)
    has_alpha = pixels.shape[-1] in (2, 4)
    return Bands(turned(pixels, orientation(high)), kind != "LA", has_alpha)


def _ppm_maximum(image: Any) -> int:
    args = image.tile[0].args
    return args[-1] if isinstance(args, tuple) else 255


def _read_ppm(image: Any, data: bytes) -> Bands:
    codec, _, offset, _ = image.tile[0]
    count, most = image.width * image.height * 3, _ppm_maximum(image)
    if codec == "ppm_plain":
        words = re.sub(rb"#[^\r\n]*", b"", data[offset:]).split(maxsplit=count)[:count]
        values = np.array([int(word) for word in words])
    else:
        values = np.frombuffer(data, ">u2", count, offset).astype(np.int64)
    if len(values) < count:
        raise BadImage(f"the file has {len(values)} of {count} values", "ValueError")
    if values.min() < 0 or values.max() > most:
        raise BadImage(f"a value is not from 0 to {most}, the maximum in the header", "ValueError")
    scaled = np.rint(values * (65_535 / most)).astype(np.uint16)
    return Bands(scaled.reshape(image.height, image.width, 3), is_rgb=True)


def _jpeg2000_bits(data: bytes) -> int:
    """Bits of the deepest component, from the header of the codestream (ISO 15444-1, A.5.1)."""
    at = data.find(b"\xff\x4f\xff\x51") + 4
    components = int.from_bytes(data[at + 36 : at + 38], "big")
    return max((data[at + 38 : at + 38 + 3 * components : 3]), default=0) % 128 + 1


def _read_jpeg2000(data: bytes, mode: str) -> Bands:
    try:
        from tifffile import COMPRESSION, TIFF

        decode = TIFF.DECOMPRESSORS[COMPRESSION.JPEG2000]  # of imagecodecs
    except (ImportError, KeyError) as error:
        message = "JPEG 2000 in colours of more than 8 bits needs imagecodecs: pip install tifffile imagecodecs"
        raise BadImage(message, "NeedsImagecodecs") from error
    # Scaled to the full range, as Pillow scales grey ones.
    pixels = decode(data).astype(np.uint16) << (16 - _jpeg2000_bits(data))
    return Bands(pixels, is_rgb=mode != "LA", has_alpha=mode != "RGB")
