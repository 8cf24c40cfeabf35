"""Colour of 16 bits, orientation and transparency, in every format that holds them."""

import base64
import io
import struct
import time
from importlib.util import find_spec

import numpy as np
import pytest
import tifffile
from bad_images import encoded, npy, png, png_chunk, tiff, tiff_of
from PIL import Image, ImageOps

from hf_mae.data import decode as decode_module
from hf_mae.data.bands import turned
from hf_mae.data.decode import BadImage, decode_image, probe_image
from hf_mae.data.prepare import reencode
from hf_mae.image_processing_base_mae import resize_bands

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
BICUBIC = Image.Resampling.BICUBIC
COLOR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}  # of PNG, by the number of bands
# Of each pass: the first row and column, and the steps down and across.
ADAM7 = [
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
]  # y, x, steps


def deep(bands: int, height: int = 9, width: int = 12) -> np.ndarray:
    return np.random.default_rng(bands).integers(0, 65_536, (height, width, bands), dtype=np.uint16)


def png_lines(pixels: np.ndarray) -> bytes:
    """Big-endian lines, every second one with the filter Sub, whose distance is that of whole pixels."""
    lines = []
    for number, line in enumerate(pixels):
        raw = np.frombuffer(line.astype(">u2").tobytes(), np.uint8)
        step = 2 * line.shape[-1]
        before = np.concatenate([np.zeros(step, np.uint8), raw[:-step]])
        lines.append(b"\x01" + (raw - before).tobytes() if number % 2 else b"\0" + raw.tobytes())
    return b"".join(lines)


def deep_png(pixels: np.ndarray, *chunks: bytes, interlaced: bool = False) -> bytes:
    height, width, bands = pixels.shape
    if not interlaced:
        return png(width, height, png_lines(pixels), *chunks, depth=16, color=COLOR_TYPE[bands])
    passes = [pixels[top::down, left::across] for top, left, down, across in ADAM7]
    plain = png(
        width, height, b"".join(png_lines(part) for part in passes if part.size), depth=16, color=COLOR_TYPE[bands]
    )
    header = bytearray(plain[12:29])  # the header's name and data, whose last byte says how lines are interlaced
    header[-1] = 1
    return plain[:8] + png_chunk(b"IHDR", bytes(header[4:])) + plain[33:]


def deep_ppm(pixels: np.ndarray, plain: bool = False) -> bytes:
    height, width, _ = pixels.shape
    if plain:
        words = " ".join(map(str, pixels.ravel().tolist()))
        return f"P3\n# a comment\n{width} {height} 65535\n{words[:40]}# another\n{words[40:]}\n".encode()
    return b"P6 %d %d 65535\n" % (width, height) + pixels.astype(">u2").tobytes()


def on_white(pixels: np.ndarray, most: int = 65_535) -> np.ndarray:
    alpha = pixels[:, :, -1:] / most
    return np.rint(pixels[:, :, :-1] * alpha + most * (1 - alpha))


# ------------------------------------------------------------------------------------------ 16 bits


def rgb16_files() -> dict[str, bytes]:
    pixels = deep(3)
    files = {
        "png": deep_png(pixels), "interlaced png": deep_png(pixels, interlaced=True), "ppm": deep_ppm(pixels),
        "plain ppm": deep_ppm(pixels, plain=True), "tiff": tiff(pixels, photometric="rgb"),
        "big-endian tiff": tiff(pixels, photometric="rgb", byteorder=">"),
        "planar tiff": tiff(np.moveaxis(pixels, -1, 0), photometric="rgb", planarconfig="separate"),
    }  # fmt: skip
    return files | {f"tiff by {name}": with_libtiff(pixels, name) for name in ("tiff_lzw", "packbits", "tiff_deflate")}


def with_libtiff(pixels: np.ndarray, compression: str) -> bytes:
    """A TIFF in a compression that tifffile can't write: the strip is Pillow's, of the same bytes as a gray image."""
    height, width, bands = pixels.shape
    raw = np.ascontiguousarray(pixels).view(np.uint8).reshape(height, -1)
    data = encoded(Image.fromarray(raw), "TIFF", compression=compression)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        (start,), (size,) = page.dataoffsets, page.databytecounts
        kind = int(page.compression)
    strip, bits = data[start : start + size], struct.pack(f"<{bands}H", *[8 * pixels.itemsize] * bands)
    values = {256: width, 257: height, 259: kind, 262: 2, 273: 8, 277: bands, 278: height, 279: size}
    entries = [(tag, 4, 1, value) for tag, value in values.items()] + [(258, 3, bands, 8 + size)]
    if bands == 4:
        entries.append((338, 3, 1, 2))
    return tiff_of(sorted(entries), pixels=strip + bits)


@pytest.mark.parametrize("name", rgb16_files())
def test_colour_of_16_bits_keeps_all_of_them(name):
    data, pixels = rgb16_files()[name], deep(3)
    assert probe_image(data) == (3, "uint16")
    assert np.array_equal(decode_image(data, 3, "uint16"), pixels)
    assert np.array_equal(decode_image(data, 3, "float32"), pixels.astype(np.float32))
    assert np.array_equal(np.asarray(decode_image(data, 3)), np.rint(pixels / 257))
    gray = np.floor(pixels @ np.array([19_595, 38_470, 7_471]) / 65_536 + 0.5)
    assert np.array_equal(decode_image(data, 1, "uint16")[:, :, 0], gray)


@pytest.mark.parametrize("bands", [2, 4])
@pytest.mark.parametrize("kind", ["png", "interlaced png", "tiff", "lzw"])
def test_transparency_of_16_bits_is_composited_or_the_last_of_four_bands(bands, kind):
    pixels = deep(bands)
    if kind == "lzw" and bands == 2:
        pytest.skip("tifffile without imagecodecs and Pillow both lack it")
    data = {
        "png": lambda: deep_png(pixels), "interlaced png": lambda: deep_png(pixels, interlaced=True),
        "tiff": lambda: tiff(pixels, photometric="rgb" if bands == 4 else "minisblack", planarconfig="contig",
                             extrasamples=["unassalpha"]),
        "lzw": lambda: with_libtiff(pixels, "tiff_lzw"),
    }[kind]()  # fmt: skip
    assert probe_image(data) == (3, "uint16")
    assert np.array_equal(decode_image(data, 3, "uint16"), np.broadcast_to(on_white(pixels), (*pixels.shape[:2], 3)))
    assert probe_image(data, 4) == (4, "uint16")
    assert np.array_equal(decode_image(data, 4, "uint16"), pixels if bands == 4 else pixels[:, :, [0, 0, 0, 1]])


def test_a_transparent_colour_of_16_bits_is_that_colour_alone():
    pixels = np.array([[[256, 512, 768], [257, 512, 768]]], np.uint16)  # the same high bytes
    data = deep_png(pixels, png_chunk(b"tRNS", pixels[0, 0].astype(">u2").tobytes()))
    assert decode_image(data, 3, "uint16").tolist() == [[[65_535] * 3, [257, 512, 768]]]
    assert decode_image(data, 4, "uint16")[0, :, 3].tolist() == [0, 65_535]


def test_premultiplied_colours_of_16_bits_are_divided_by_alpha():
    stored = np.array([[[1_000, 2_000, 0, 32_768], [0, 0, 0, 0]]], np.uint16)
    data = tiff(stored, photometric="rgb", extrasamples=["assocalpha"])
    half = 65_535 / 32_768
    assert decode_image(data, 4, "uint16")[0, 0].tolist() == [round(1_000 * half), round(2_000 * half), 0, 32_768]
    assert decode_image(data, 3, "uint16")[0, 1].tolist() == [65_535] * 3


@pytest.mark.parametrize(("most", "value", "scaled"), [(1_023, 512, 32_800), (4_095, 4_095, 65_535), (256, 1, 256)])
def test_a_ppm_of_other_maxima_is_scaled_to_16_bits(most, value, scaled):
    for data in (b"P6 1 1 %d\n" % most + value.to_bytes(2, "big") * 3, b"P3 1 1 %d %d %d %d" % (most, *[value] * 3)):
        assert decode_image(data, 3, "uint16").tolist() == [[[scaled] * 3]]  # value / most * 65535, rounded


@pytest.mark.parametrize("data", [b"P6 2 2 65535\n" + bytes(23), b"P3 2 1 1000 1 2 3 4 5", b"P3 1 1 999 1 2 1000"])
def test_a_ppm_with_missing_or_too_large_values_is_bad(data):
    with pytest.raises(BadImage):
        decode_image(data, 3, "uint16")


# (4, 5, 3) of 0, 1091, 2182, ..., shifted to this number of bits.
JPEG2000 = {
    16: "AAAADGpQICANCocKAAAAFGZ0eXBqcDIgAAAAAGpwMiAAAAAtanAyaAAAABZpaGRyAAAABAAAAAUAAw8HAAAAAAAPY29scgEAAAAA"
    "ABAAAAEQanAyY/9P/1EALwAAAAAABQAAAAQAAAAAAAAAAAAAAAUAAAAEAAAAAAAAAAAAAw8BAQ8BAQ8BAf9SAAwAAAABAAAEBAAB"
    "/1wABECA/2QAJQABQ3JlYXRlZCBieSBPcGVuSlBFRyB2ZXJzaW9uIDIuNS40/5AACgAAAAAAmAAB/5Pf+JFYEhUFBoJOOUeTWQ2O"
    "2tiggCstw8i0mf11I8gGipAPPxjqGKhr7624ggh2n8/8MKgRg8yTEKoytTAmGdFXYQXuJKMWd3eHej9CKLiUptUxS6uKi0YHd0TI"
    "0T/P/DCkEYPMkh7oM3wCsdA+Q1wwVuO0tWAhjZhugqTeMkFKOnXI1n+7AHlWHqf/2Q==",
    12: "AAAADGpQICANCocKAAAAFGZ0eXBqcDIgAAAAAGpwMiAAAAAtanAyaAAAABZpaGRyAAAABAAAAAUAAwsHAAAAAAAPY29scgEAAAAA"
    "ABAAAADtanAyY/9P/1EALwAAAAAABQAAAAQAAAAAAAAAAAAAAAUAAAAEAAAAAAAAAAAAAwsBAQsBAQsBAf9SAAwAAAABAAAEBAAB"
    "/1wABEBg/2QAJQABQ3JlYXRlZCBieSBPcGVuSlBFRyB2ZXJzaW9uIDIuNS40/5AACgAAAAAAdQAB/5Pf4IASFQUGgk45R5NZDY7a"
    "2KCAKy3DyLSZ/XW4NOpDhWeIkc/kgBGDzJMQqjK1MCYZ0VdhBe4kowMQHzeLgtWHH4JMEmFfz+R4EYPMkh7oM3wCsdA+Q1wwOI02"
    "DCBoiia8fxiWcuob/9k=",
}  # fmt: skip


@pytest.mark.parametrize("bits", JPEG2000)
def test_jpeg_2000_of_more_than_8_bits_is_read_whole_or_not_at_all(bits):
    data = base64.b64decode(JPEG2000[bits])
    assert probe_image(data) == (3, "uint16")
    if find_spec("imagecodecs") is None:
        with pytest.raises(BadImage, match="pip install tifffile imagecodecs") as caught:
            decode_image(data, 3, "uint16")
        assert caught.value.reason == "NeedsImagecodecs"
    else:
        stored = (np.arange(60, dtype=np.uint16) * 1_091).reshape(4, 5, 3) >> (16 - bits)
        assert np.array_equal(decode_image(data, 3, "uint16"), stored << (16 - bits))
    assert probe_image(encoded(Image.new("RGB", (4, 5)), "JPEG2000")) == (3, "uint8")


@pytest.mark.parametrize("bands", [2, 3, 4])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_prepare_keeps_16_bits_of_colour_also_where_it_resizes(bands, kind):
    pixels = deep(bands, 40, 60)
    extra = {"extrasamples": ["unassalpha"]} if bands != 3 else {}
    photometric = "minisblack" if bands == 2 else "rgb"
    data = deep_png(pixels) if kind == "png" else tiff(pixels, photometric=photometric, planarconfig="contig", **extra)
    assert reencode(data, 40, 90) is data
    small = reencode(data, 20, 90)
    assert probe_image(small) == (3, "uint16")
    channels = 3 if bands == 3 else 4
    resized = resize_bands(pixels, (20, 30), BICUBIC)
    expected = resized[:, :, [0, 0, 0, 1]] if bands == 2 else resized
    assert np.array_equal(decode_image(small, channels, "uint16"), expected)
    with Image.open(io.BytesIO(small)) as image:  # other programs read it too
        assert image.size == (30, 20)


# ------------------------------------------------------------------------------------------ orientation


def turned_file(format: str, orientation: int, pixels: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pixels)
    if format == "TIFF":
        return encoded(image, "TIFF", tiffinfo={274: orientation})
    return encoded(
        image, format, exif=exif, **{"JPEG": {"quality": 95, "subsampling": 0}}.get(format, {"lossless": True})
    )


def quadrants() -> np.ndarray:
    """(32, 48, 3) with another colour in each corner."""
    colors = np.array([[[250, 10, 10], [10, 250, 10]], [[10, 10, 250], [120, 120, 120]]], np.uint8)
    return colors.repeat(16, axis=0).repeat(24, axis=1)


# Where the stored top left corner is seen, as (row, column), 0 or -1; and the stored top right one. From the EXIF
# standard: 6 says that the stored first row is the right side, and the first column the top.
CORNERS = {
    1: ((0, 0), (0, -1)), 2: ((0, -1), (0, 0)), 3: ((-1, -1), (-1, 0)), 4: ((-1, 0), (-1, -1)),
    5: ((0, 0), (-1, 0)), 6: ((0, -1), (-1, -1)), 7: ((-1, -1), (0, -1)), 8: ((-1, 0), (0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(format, orientation, monkeypatch):
    data = turned_file(format, orientation, quadrants())
    (red, green) = CORNERS[orientation]
    for extra in (True, False):
        if not extra:
            monkeypatch.setattr(decode_module, "simplejpeg", None)
        for options in ({}, {"min_pixels": 32 * 48}, {"min_pixels": 1}):
            image = np.asarray(decode_image(data, 3, **options)).astype(int)
            assert (image.shape[0] > image.shape[1]) == (orientation >= 5)
            assert np.abs(image[red] - [250, 10, 10]).max() < 6
            assert np.abs(image[green] - [10, 250, 10]).max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_that_pillow_does_not_decode_are_upright(orientation):
    pixels = deep(3, 4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = Image.new("L", (6, 4))
    plain.putdata(list(range(24)))
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(plain, exif=exif)))))  # of pixel numbers
    tag = (274, 3, 1, orientation, True)
    for data in (
        deep_png(pixels, png_chunk(b"eXIf", exif.tobytes()[6:])),
        tiff(pixels, photometric="rgb", extratags=[tag]),
    ):
        assert np.array_equal(decode_image(data, 3, "uint16"), pixels.reshape(24, 3)[wanted])
    five = deep(5, 4, 6)
    data = tiff(five, photometric="minisblack", planarconfig="contig", extratags=[tag])
    assert np.array_equal(decode_image(data, 5, "uint16"), five.reshape(24, 5)[wanted])
    assert np.array_equal(turned(five, orientation), five.reshape(24, 5)[wanted])


def test_exif_after_the_pixels_of_a_png_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (20, 12)))
    late = data[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]
    assert decode_image(late, 3).size == (12, 20)


@pytest.mark.parametrize("rest", [b"II*\0garbage", b"", b"MM\0*\0\0\0\x08\xff\xff", b"junk" * 9])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_does_not_break_the_image(format, rest):
    data = encoded(Image.new("RGB", (20, 12)), format, exif=b"Exif\0\0" + rest)
    assert decode_image(data, 3).size == (20, 12)
    assert np.asarray(decode_image(data, 3, min_pixels=240)).shape == (12, 20, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    data = turned_file("JPEG", orientation, quadrants())
    assert decode_image(data, 3).size == (48, 32)


def test_an_upright_image_is_not_turned_again():
    image = decode_image(turned_file("JPEG", 6, quadrants()), 3)
    assert image.size == (32, 48)
    assert ImageOps.exif_transpose(image).tobytes() == image.tobytes()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_prepared_images_are_upright_once(format, orientation):
    data = turned_file(format, orientation, quadrants())
    small = reencode(data, 16, 95)
    assert Image.open(io.BytesIO(small)).getexif().get(0x0112, 1) == 1
    kept = reencode(data, 32, 95)
    assert kept is data
    red, green = CORNERS[orientation]
    for result in (small, kept):
        image = np.asarray(decode_image(result, 3)).astype(int)
        assert (image.shape[0] > image.shape[1]) == (orientation >= 5)
        assert np.abs(image[red] - [250, 10, 10]).max() < 6
        assert np.abs(image[green] - [10, 250, 10]).max() < 6


# ------------------------------------------------------------------------------------------ transparency


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_a_fourth_channel_only_where_four_are_wanted(format):
    rgba = np.random.default_rng(0).integers(0, 256, (6, 8, 4), dtype=np.uint8)
    data = encoded(Image.fromarray(rgba), format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    assert probe_image(data) == (3, "uint8")
    assert probe_image(data, 4) == (4, "uint8")
    assert np.array_equal(decode_image(data, 4), rgba)
    assert np.array_equal(decode_image(data, 4, "uint16"), rgba.astype(np.uint16) * 257)
    small = reencode(encoded(Image.fromarray(rgba).resize((80, 60)), format), 6, 90)
    assert probe_image(small, 4) == (4, "uint8")


def test_transparency_of_palettes_and_gray_images_is_a_fourth_channel_too():
    gray = Image.merge("LA", [Image.new("L", (2, 1), 7), Image.new("L", (2, 1), 9)])
    assert decode_image(encoded(gray), 4).tolist() == [[[7, 7, 7, 9]] * 2]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putpixel((1, 0), 1)
    data = encoded(palette, transparency=1)
    assert probe_image(data, 4) == (4, "uint8")
    assert decode_image(data, 4).tolist() == [[[1, 2, 3, 255], [4, 5, 6, 0]]]


def test_an_opaque_image_among_transparent_ones_is_opaque_but_a_jpeg_has_three_channels():
    opaque = Image.new("RGB", (2, 1), (1, 2, 3))
    for format in ("PNG", "WEBP"):
        data = encoded(opaque, format, **({"lossless": True} if format == "WEBP" else {}))
        assert decode_image(data, 4).tolist() == [[[1, 2, 3, 255]] * 2]
        assert probe_image(data, 4) == (3, "uint8")
    for format in ("JPEG", "TIFF"):
        with pytest.raises(BadImage, match="has no axis of 4 channels"):
            decode_image(encoded(opaque, format), 4)


# ------------------------------------------------------------------------------------------ animations


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_of_thousands_of_frames_costs_milliseconds(format):
    frames = [Image.new("RGB", (16, 16), (i % 256, 0, 0)) for i in range(2_000)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    started = time.process_time()
    for _ in range(10):
        probe_image(data)
        decode_image(data, 3)
    assert (time.process_time() - started) / 10 < 0.05
    assert npy(np.asarray(decode_image(data, 3))) == npy(np.zeros((16, 16, 3), np.uint8))
