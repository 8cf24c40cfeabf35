"""What a file may claim before it is decoded, and the error for a sample that can't be used."""

import contextlib
import math
from collections.abc import Iterator, Sequence

from PIL import Image, UnidentifiedImageError

from ..errors import MissingPackage

MAX_SIDE = 65_535  # pixels; JPEG's limit
# Each scan of a progressive JPEG is one more decoding pass. Ten are usual, but a hundred bytes are enough for another.
MAX_JPEG_PASSES = 32  # for an image of the maximum size; smaller images may have more
JPEG_MAGIC = b"\xff\xd8\xff"


class BadImage(ValueError):
    """A sample that can't be used. A run counts it and skips it.

    Attributes:
        reason: class name of the decoder's exception, or one of our own words: `EmptyFile`, `TooManyPixels`,
            `TooManyScans`, `TooManyPages`, `WrongChannels`, `WrongDtype`, `NotFinite`, `NoData`, `NeedsImagecodecs`;
            or, if the source can't give the image: `NoBytes`, `RaggedArray`, `CorruptRowGroup`, `TruncatedTar`.
    """

    def __init__(self, message: str, reason: str = "BadImage"):
        super().__init__(message)
        self.reason = reason


BadSample = tuple[str, str]  # the key of a row that can't be used, and the reason


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


def check_size(width: int, height: int, data: bytes) -> None:
    """Refuse a file before it is decoded, from the size that its header claims."""
    limit = Image.MAX_IMAGE_PIXELS  # a user of huge images may have raised it
    if max(width, height) > MAX_SIDE or (limit is not None and width * height > limit):
        raise BadImage(f"{width} x {height} pixels; limits: {limit} in total, {MAX_SIDE} per side", "TooManyPixels")
    if data.startswith(JPEG_MAGIC) and limit is not None:
        scans = MAX_JPEG_PASSES * limit // (width * height)
        # A scan has at least ten bytes, so most files are too short to need counting.
        if len(data) > 10 * scans and data.count(b"\xff\xda") > scans:
            raise BadImage(f"more than {scans} scans of {width} x {height} pixels", "TooManyScans")


def check_shape(shape: Sequence[int], num_channels: int | None) -> None:
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
