"""TIFF: kinds of numbers, bands beside colour, pages."""

import io
import struct
import time
from typing import Any

import numpy as np
import pytest
import tifffile
from bad_images import encoded, gray_page, tiff, tiff_of
from PIL import Image

from hf_mae.data.decode import BadImage, decode_image, probe_image
from hf_mae.data.prepare import reencode
from hf_mae.image_processing_base_mae import resize_bands

VALUES: dict[str, list[int | float]] = {
    "int8": [-128, -1, 0, 127], "int16": [-32_768, -5, 0, 32_767], "int32": [-(2**31), -70_000, 0, 2**24],
    "uint32": [0, 65_536, 2**24, 2**32 - 256], "float16": [-0.5, 0, 1, 2_048], "float32": [-1e-30, 0, 0.1, 3e38],
    "float64": [-0.5, 0, 1e-30, 1e30], "int64": [-5, 0, 1, 2**40], "uint64": [0, 1, 2**24, 2**63],
}  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"compression": "zlib"}, {"rowsperstrip": 1}], ids=["raw", "deflated", "strips"]
)
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", VALUES)
def test_numbers_of_every_kind_become_the_nearest_float32(dtype, byteorder, options):
    values = np.array(VALUES[dtype]).astype(dtype).reshape(2, 2)
    data = tiff(values, byteorder=byteorder, **options)
    assert probe_image(data) == (1, "float32")
    assert np.array_equal(decode_image(data, 1, "float32")[:, :, 0], values.astype(np.float32))
    assert np.array_equal(decode_image(data, 3, "float32")[:, :, 2], values.astype(np.float32))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32"])
def test_integers_other_than_uint8_and_uint16_are_float32_even_without_large_values(dtype):
    assert probe_image(tiff(np.array([[0, 100]], dtype))) == (1, "float32")


@pytest.mark.parametrize("compression", [5, 32773])  # LZW, PackBits: tifffile needs imagecodecs, Pillow does not
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "float32"])
def test_compressions_that_tifffile_lacks_keep_every_kind_of_number(dtype, compression):
    values = np.array(VALUES[dtype]).astype(dtype).reshape(2, 2)
    name = {5: "tiff_lzw", 32773: "packbits"}[compression]
    gray = encoded(Image.fromarray(values.view(np.uint8).reshape(2, -1)), "TIFF", compression=name)
    with tifffile.TiffFile(io.BytesIO(gray)) as file:
        (start,), (size,) = file.pages.first.dataoffsets, file.pages.first.databytecounts
    kind = {"i": 2, "u": 1, "f": 3}[values.dtype.kind]
    tags = {
        256: 2,
        257: 2,
        258: 8 * values.itemsize,
        259: compression,
        262: 1,
        273: 8,
        277: 1,
        278: 2,
        279: size,
        339: kind,
    }
    data = tiff_of([(tag, 4, 1, value) for tag, value in tags.items()], pixels=gray[start : start + size])
    assert probe_image(data) == (1, "float32")
    assert np.array_equal(decode_image(data, 1, "float32")[:, :, 0], values.astype(np.float32))


def test_prepare_keeps_numbers_below_zero():
    heights = np.random.default_rng(0).integers(-500, 9_000, (40, 60)).astype(np.int16)
    small = reencode(tiff(heights), 20, 90)
    assert probe_image(small) == (1, "float32")
    expected = resize_bands(heights[:, :, None].astype(np.float32), (20, 30), Image.Resampling.BICUBIC)
    assert np.abs(decode_image(small, 1, "float32") - expected).max() <= 0.5  # rounded


# ------------------------------------------------------------------------------------------ bands beside colour


def bands_of(dtype: Any, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (height, width, 4)).astype(dtype)


def rgbn(pixels: np.ndarray, **options: Any) -> bytes:
    """Red, green, blue and a band of which nothing is said, such as near infrared."""
    return tiff(pixels, photometric="rgb", extrasamples=["unspecified"], **options)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}], ids=["raw", "deflated", "big"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_fourth_band_that_is_not_transparency_is_kept(dtype, options):
    pixels = bands_of(dtype)
    data = rgbn(pixels, **options)
    for wanted in (None, 4):
        assert probe_image(data, wanted) == (4, dtype)
    assert np.array_equal(decode_image(data, 4, dtype), pixels)
    assert probe_image(data, 3) == (3, dtype)
    assert np.array_equal(np.asarray(decode_image(data, 3, dtype)), pixels[:, :, :3])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_fourth_band_is_kept_where_it_lies_apart_or_is_compressed_by_lzw(dtype):
    pixels = bands_of(dtype)
    planar = tiff(np.moveaxis(pixels, -1, 0), photometric="rgb", planarconfig="separate", extrasamples=["unspecified"])
    height, width, _ = pixels.shape
    gray = encoded(Image.fromarray(pixels.view(np.uint8).reshape(height, -1)), "TIFF", compression="tiff_lzw")
    with tifffile.TiffFile(io.BytesIO(gray)) as file:
        (start,), (size,) = file.pages.first.dataoffsets, file.pages.first.databytecounts
    bits = struct.pack("<4H", *[8 * pixels.itemsize] * 4)
    tags = {256: width, 257: height, 259: 5, 262: 2, 273: 8, 277: 4, 278: height, 279: size, 338: 0}
    entries = sorted([(tag, 4, 1, value) for tag, value in tags.items()] + [(258, 3, 4, 8 + size)])
    for data in (planar, tiff_of(entries, pixels=gray[start : start + size] + bits)):
        assert probe_image(data) == (4, dtype)
        assert np.array_equal(decode_image(data, 4, dtype), pixels)


def test_five_bands_of_which_the_last_is_transparency_are_five():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 5), dtype=np.uint8)
    data = tiff(pixels, photometric="rgb", extrasamples=["unspecified", "unassalpha"])
    assert probe_image(data) == (5, "uint8")
    assert np.array_equal(decode_image(data, 5), pixels)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_prepare_keeps_the_fourth_band(dtype):
    pixels = bands_of(dtype, 40, 60)
    small = reencode(rgbn(pixels), 20, 90)
    expected = resize_bands(pixels, (20, 30), Image.Resampling.BICUBIC)
    assert probe_image(small) == (4, dtype)
    assert np.array_equal(decode_image(small, 4, dtype), expected)
    assert np.array_equal(np.asarray(decode_image(small, 3, dtype)), expected[:, :, :3])


# ------------------------------------------------------------------------------------------ pages


def pages_of(count: int, back_to: int | None = None, big: bool = False) -> bytes:
    """Gray pages of 24 x 16 that share their pixels; the last one leads back to another if `back_to` is given."""
    if big:
        return tiff(np.zeros((count, 16, 24), np.uint8), bigtiff=True, metadata=None)
    page = tiff_of(gray_page(24, 16))[8:-4]
    starts = [392 + (len(page) + 4) * number for number in range(count)]
    following = [*starts[1:], 0 if back_to is None else starts[back_to]]
    links = b"".join(page + struct.pack("<I", start) for start in following)
    return b"II*\0" + struct.pack("<I", starts[0]) + bytes(384) + links


def seconds(call: Any) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


@pytest.mark.parametrize("data", [pages_of(8_000), pages_of(8_000, big=True)], ids=["classic", "big"])
def test_a_tiff_of_thousands_of_pages_costs_milliseconds(data):
    def refused():
        for call in (lambda: probe_image(data), lambda: decode_image(data, 4), lambda: reencode(data, 8, 90)):
            with pytest.raises(BadImage, match="more than 512 pages") as caught:
                call()
            assert caught.value.reason == "TooManyPages"

    assert seconds(refused) < 0.3
    assert seconds(lambda: decode_image(data, 1)) < 0.1
    assert np.asarray(decode_image(data, 3)).shape == (16, 24, 3)
    assert probe_image(data, 1) == (1, "uint8")


def test_up_to_512_pages_are_bands_and_as_many_as_are_asked_for():
    assert probe_image(pages_of(512)) == (24, "uint8")  # the shorter of 512 and 24 is taken for the channels
    assert decode_image(pages_of(512), 512).shape == (16, 24, 512)
    assert decode_image(pages_of(600), 600).shape == (16, 24, 600)


def test_pages_that_are_said_to_be_one_array_may_be_more():
    array = np.random.default_rng(0).integers(0, 255, (700, 20, 13), dtype=np.uint8)
    data = tiff(array)  # tifffile writes 700 pages of 20 x 13, and that they are an array of three axes
    assert probe_image(data) == (13, "uint8")
    assert np.array_equal(decode_image(data, 13), array)
    assert seconds(lambda: probe_image(data)) < 0.3


@pytest.mark.parametrize("back_to", [0, 1, 4])
def test_pages_in_a_circle_are_not_bands_and_the_first_is_read(back_to):
    data = pages_of(5, back_to)
    for wanted in (5, 4):
        with pytest.raises(BadImage, match="pages in a circle"):
            decode_image(data, wanted)
    assert np.asarray(decode_image(data, 1)).shape == (16, 24)
    assert probe_image(pages_of(1, 0)) == (1, "uint8")


def test_a_page_that_is_said_to_lie_beyond_the_file_is_none():
    data = bytearray(pages_of(1))
    data[-4:] = struct.pack("<I", 10**9)
    assert probe_image(bytes(data)) == (1, "uint8")
