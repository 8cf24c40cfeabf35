"""Files that a loader must survive, made here byte by byte: what each is, and what is to become of it.

Every one is meant for a model of 3 channels of 8 bits. Good ones show three upright stripes of 8 x 16 pixels, if
nothing else is said.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tifffile
from PIL import Image, features

WIDTH, HEIGHT = 24, 16
STRIPES = [(200, 40, 60), (30, 180, 90), (50, 70, 210)]
GRAYS = [0, 128, 255]


@dataclass
class Case:
    """A file.

    Args:
        name: of the file.
        data: what is in it.
        reason: of the `BadImage` that it is; None if it can be decoded.
        pixels: of a good one (H, W, 3), or None where that is left open.
        tolerance: largest difference from them, for lossy formats.
    """

    name: str
    data: bytes
    reason: str | None = None
    pixels: np.ndarray | None = None
    tolerance: int = 0


# ------------------------------------------------------------------------------------------ writers


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **options)
    return stream.getvalue()


def npy(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def npy_header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    """An `.npy` file that claims a shape and has no numbers."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, *chunks: bytes, depth: int = 8, color: int = 2) -> bytes:
    """A PNG of a size, with these (filtered) pixels, whatever they are, and other chunks before them."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    content = png_chunk(b"IDAT", zlib.compress(pixels, 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + content + png_chunk(b"IEND", b"")


def tiff_of(entries: Sequence[tuple[int, int, int, int]], following: int = 0, pixels: bytes = b"") -> bytes:
    """A TIFF of one page whose pixels are at byte 8: (tag, type, count, value) each, and where the next page is."""
    start = 8 + len(pixels)
    page = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", start) + pixels + page + struct.pack("<I", following)


def gray_page(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The tags of a page of 8-bit gray pixels, uncompressed, at byte 8."""
    count = width * height
    values = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: count}
    return [(tag, 4, 1, value % 2**32) for tag, value in values.items()]


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def jpeg_of_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG that claims another size: in its SOF0 or SOF2."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return patched(data, at + 5, struct.pack(">HH", height, width))


def webp_of_size(width: int, height: int) -> bytes:
    """A WEBP of one tiny frame on a canvas of another size."""
    still = encoded(Image.new("RGB", (16, 16)), "WEBP")[12:]

    def three(number: int) -> bytes:
        return struct.pack("<I", number)[:3]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return kind + struct.pack("<I", len(data)) + data

    canvas = chunk(b"VP8X", b"\x02\0\0\0" + three(width - 1) + three(height - 1))
    frame = chunk(b"ANMF", bytes(6) + three(15) * 2 + bytes(4) + still)
    content = b"WEBP" + canvas + chunk(b"ANIM", bytes(6)) + frame
    return b"RIFF" + struct.pack("<I", len(content)) + content


# ------------------------------------------------------------------------------------------ pictures


def stripes(mode: str = "RGB", values: Sequence[Any] = STRIPES) -> Image.Image:
    picture = Image.new(mode, (WIDTH, HEIGHT))
    for number, value in enumerate(values):
        picture.paste(value, (8 * number, 0, 8 * number + 8, HEIGHT))
    return picture


def shown(*colors: Any) -> np.ndarray:
    """(H, W, 3) stripes of these colours, or grays."""
    rgb = np.array([color if isinstance(color, tuple) else (color,) * 3 for color in colors], np.uint8)
    return np.broadcast_to(np.repeat(rgb, 8, axis=0), (HEIGHT, WIDTH, 3))


def noise(width: int = 200, height: int = 100, bands: int = 3, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (height, width, bands), dtype)


def animation(format: str, **options: Any) -> bytes:
    """Stripes, then two frames of something else."""
    others = [Image.new("RGB", (WIDTH, HEIGHT), (value,) * 3) for value in (9, 99)]
    return encoded(stripes(), format, save_all=True, append_images=others, **options)


# ------------------------------------------------------------------------------------------ the corpus


def good_cases() -> list[Case]:
    color, gray = shown(*STRIPES), shown(*GRAYS)
    # Opaque, a fifth of it, and transparent. White shines through: 0.2 * 30 + 0.8 * 255 = 210.
    rgba = stripes("RGBA", [(*rgb, alpha) for rgb, alpha in zip(STRIPES, (255, 51, 0), strict=True)])
    on_white = shown(STRIPES[0], (210, 240, 222), 255)
    gray_alpha = stripes("LA", list(zip(GRAYS, (255, 51, 0), strict=True)))
    palette = stripes().quantize(4)
    index = palette.getpixel((0, 0))
    without_first = shown(255, *STRIPES[1:])
    gray16 = np.broadcast_to(np.repeat(np.array([0, 32_896, 65_535], np.uint16), 8), (HEIGHT, WIDTH))
    gray16_image = Image.fromarray(gray16)
    fine = {"quality": 95, "subsampling": 0}
    turned = Image.Exif()
    turned[0x0112] = 6
    zero_over_zero = b"Exif\0\0" + tiff_of([(282, 5, 1, 8), (283, 5, 1, 8)], pixels=bytes(8))
    jpeg = encoded(Image.fromarray(noise()), "JPEG")
    stripes_png = encoded(stripes())
    black = shown(0, 0, 0)
    return [
        Case("rgb.png", stripes_png, None, color),
        Case("a_png_in_truth.jpg", stripes_png, None, color),
        Case("rgb.jpg", encoded(stripes(), "JPEG", **fine), None, color, 4),
        Case("progressive.jpg", encoded(stripes(), "JPEG", progressive=True, **fine), None, color, 4),
        Case("cmyk.jpg", encoded(stripes().convert("CMYK"), "JPEG", **fine), None, color, 4),
        Case("cmyk.tif", encoded(stripes().convert("CMYK"), "TIFF"), None, color),
        Case("exif_turned.jpg", encoded(stripes(), "JPEG", exif=turned, **fine), None, np.rot90(color, -1), 4),
        Case("exif_of_rubbish.jpg", encoded(stripes(), "JPEG", exif=b"Exif\0\0II*\0rubbish", **fine), None, color, 4),
        Case("exif_zero_over_zero.jpg", encoded(stripes(), "JPEG", exif=zero_over_zero, **fine), None, color, 4),
        Case("damaged_in_the_middle.jpg", patched(jpeg, len(jpeg) // 2, b"\x55" * 9)),
        Case("one_bit.png", encoded(stripes("1", [0, 1, 1])), None, shown(0, 255, 255)),
        Case("gray.png", encoded(stripes("L", GRAYS)), None, gray),
        Case("gray_alpha.png", encoded(gray_alpha), None, shown(0, 230, 255)),
        Case("rgba.png", encoded(rgba), None, on_white),
        Case("rgba.tif", encoded(rgba, "TIFF"), None, on_white),
        Case("rgba.webp", encoded(rgba, "WEBP", lossless=True, exact=True), None, on_white),
        Case("palette.png", encoded(palette), None, color),
        Case("palette_with_transparency.png", encoded(palette, transparency=index), None, without_first),
        Case("palette_with_transparency.gif", encoded(palette, "GIF", transparency=index), None, without_first),
        Case("a_transparent_color.png", encoded(stripes(), transparency=STRIPES[0]), None, without_first),
        Case("gray16.png", encoded(gray16_image), None, gray),
        Case("gray16.tif", encoded(gray16_image, "TIFF"), None, gray),
        Case("gray16_big_endian.tif", tiff(gray16, byteorder=">"), None, gray),
        Case("gray16.pgm", b"P5 24 16 65535\n" + gray16.astype(">u2").tobytes(), None, gray),
        Case("gray16.npy", npy(gray16), None, gray),
        Case("gray16_big_endian.npy", npy(gray16.astype(">u2")), None, gray),
        Case("rgb16_deflated.tif", tiff(color.astype(np.uint16) * 257, compression="zlib"), None, color),
        Case("rgb.npy", npy(color), None, color),
        Case("rgb.bmp", encoded(stripes(), "BMP"), None, color),
        Case("rgb.ppm", encoded(stripes(), "PPM"), None, color),
        Case("lossless.jp2", encoded(stripes(), "JPEG2000"), None, color),
        Case("wrong_checksum_of_pixels.png", patched(stripes_png, len(stripes_png) - 16, b"rubb"), None, color),
        Case("animated.gif", animation("GIF"), None, color),
        Case("animated.webp", animation("WEBP", lossless=True), None, color),
        Case("animated.png", animation("PNG"), None, color),
        Case("pages_in_a_circle.tif", tiff_of(gray_page(24, 16), 8 + 384, bytes(384)), None, black),
        Case("very_many_pages.tif", _many_pages(30_000), None, black),
        Case("one_pixel.png", encoded(Image.new("RGB", (1, 1), STRIPES[0])), None, np.array([[STRIPES[0]]])),
        Case("a_row.png", encoded(Image.new("RGB", (5_000, 1))), None, np.zeros((1, 5_000, 3))),
        Case("a_column.png", encoded(Image.new("RGB", (1, 65_535))), None, np.zeros((65_535, 1, 3))),
    ]


def _many_pages(count: int) -> bytes:
    page = tiff_of(gray_page(24, 16))[8:]
    starts = [8 + 384 + len(page) * number for number in range(count)]
    pages = [patched(page, len(page) - 4, struct.pack("<I", following)) for following in [*starts[1:], 0]]
    return b"II*\0" + struct.pack("<I", starts[0]) + bytes(384) + b"".join(pages)


def bad_cases() -> list[Case]:
    picture, deep = Image.fromarray(noise()), tiff(noise(dtype=np.uint16), compression="zlib")
    jpeg, progressive = encoded(picture, "JPEG"), encoded(picture, "JPEG", progressive=True)
    png_file, gif, webp, bmp = (encoded(picture, format) for format in ("PNG", "GIF", "WEBP", "BMP"))
    ppm, lzw = encoded(picture, "PPM"), encoded(picture, "TIFF", compression="tiff_lzw")
    avif = encoded(picture, "AVIF") if features.check("avif") else b"rubbish of any kind"
    jp2, j2k = encoded(picture, "JPEG2000"), encoded(picture, "JPEG2000", no_jp2=True)
    broken = {
        "zero_byte.jpg": (b"", "EmptyFile"),
        "one_byte.png": (b"\x89", "UnidentifiedImageError"),
        "text.jpg": (b"hello\n", "UnidentifiedImageError"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "UnidentifiedImageError"),
        "drawing.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "UnidentifiedImageError"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n", "UnidentifiedImageError"),
        "photoshop.png": (b"8BPS\0\1" + bytes(7) + b"\3\0\0\0\t\0\0\0\t\0\x08\0\3", "UnidentifiedImageError"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "OSError"),
        "half_progressive.jpg": (progressive[: len(progressive) // 2], "OSError"),
        "head_alone.jpg": (jpeg[:30], "OSError"),
        "half.png": (png_file[: len(png_file) // 2], "OSError"),
        "signature_alone.png": (png_file[:8], "UnidentifiedImageError"),
        "wrong_checksum_of_header.png": (patched(png_file, 29, b"rubb"), "UnidentifiedImageError"),
        "flipped_bit.png": (patched(png_file, 99, bytes([png_file[99] ^ 1])), "OSError"),
        "half.gif": (gif[: len(gif) // 2], "OSError"),
        "half.webp": (webp[: len(webp) // 2], "OSError"),
        "half.bmp": (bmp[: len(bmp) // 2], "OSError"),
        "half.ppm": (ppm[: len(ppm) // 2], "OSError"),
        "half.tif": (lzw[: len(lzw) // 2], "IndexError"),
        "half_rgb16.tif": (deep[: len(deep) // 2], "error"),
        "half.jp2": (jp2[: len(jp2) // 2], "OSError"),
        "half.avif": (avif[: len(avif) // 2], "UnidentifiedImageError"),
        "half.npy": (npy(noise())[:30_000], "ValueError"),
    }  # fmt: skip
    of_no_use = {
        "float.tif": (tiff(noise()[:, :, 0].astype(np.float32)), "WrongDtype"),
        "float.npy": (npy(noise() / 255), "WrongDtype"),
        "int32_too_wide.tif": (tiff(np.array([[0, 65_536]], np.int32)), "WrongDtype"),
        "complex.npy": (npy(np.zeros((9, 9), np.complex64)), "WrongDtype"),
        "words.npy": (npy(np.array([["a", "b"]])), "WrongDtype"),
        "five_bands.npy": (npy(noise(bands=5)), "WrongChannels"),
        "four_axes.npy": (npy(np.zeros((2, 2, 2, 2), np.uint8)), "WrongChannels"),
        "no_rows.npy": (npy(np.zeros((0, 9), np.uint8)), "EmptyFile"),
    }
    expanding = zlib.compress(bytes(300 * 2**20), 9)
    texts = [png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 2**20, 9))] * 100
    scans = progressive[progressive.rfind(b"\xff\xda") : -2] * 400 + b"\xff\xd9"
    bands = [*gray_page(9_000, 9_000)[:-3], (277, 4, 1, 9_000), (278, 4, 1, 9_000), (279, 4, 1, 9)]
    tiles = [*gray_page(24, 16)[:5], (277, 4, 1, 1), *((tag, 4, 1, 46_000) for tag in (322, 323)), (324, 4, 1, 8)]
    size_at, canvas_at, frame_at = j2k.find(b"\xff\x51") + 6, avif.find(b"ispe") + 8, gif.find(b"\x2c\0\0\0\0") + 5
    hostile = {
        "pickled_objects.npy": (npy(np.array([[{}]], dtype=object), allow_pickle=True), "ValueError"),
        "225_megapixels.png": (png(15_000, 15_000, bytes(15_000 * 1_876), depth=1, color=0), "TooManyPixels"),
        "100_megapixels.png": (png(10_000, 10_000, bytes(10_000 * 1_251), depth=1, color=0), "TooManyPixels"),
        "longer_than_any_jpeg.png": (png(70_000, 2, bytes(140_002), color=0), "TooManyPixels"),
        "huge.png": (png(2**31 - 1, 2**31 - 1, b""), "TooManyPixels"),
        "huge.jpg": (jpeg_of_size(jpeg, 65_500, 65_500), "TooManyPixels"),
        "huge.gif": (patched(gif, 6, struct.pack("<HH", 65_535, 65_535)), "TooManyPixels"),
        "huge_frame.gif": (patched(gif, frame_at, struct.pack("<HH", 65_535, 65_535)), "TooManyPixels"),
        "huge.webp": (webp_of_size(2**14, 2**14), "TooManyPixels"),
        "huge.bmp": (patched(bmp, 18, struct.pack("<ii", 2**30, 2**30)), "TooManyPixels"),
        "huge.tif": (tiff_of(gray_page(60_000, 60_000)), "TooManyPixels"),
        "huge_tile.tif": (tiff_of([*tiles, (325, 4, 1, 99)], pixels=bytes(99)), "TooManyPixels"),
        "huge.ppm": (b"P6 99999 99999 255\n" + bytes(99), "TooManyPixels"),
        "huge.j2k": (patched(j2k, size_at, struct.pack(">II", 2**31, 2**31)), "TooManyPixels"),
        "millions_of_tiles.j2k": (patched(j2k, size_at, struct.pack(">IIIIII", 9_000, 9_000, 0, 0, 1, 1)), "OSError"),
        "huge.avif": (patched(avif, canvas_at, struct.pack(">II", 65_535, 65_535)), "UnidentifiedImageError"),
        "huge.npy": (npy_header((60_000, 60_000)), "TooManyPixels"),
        "more_than_it_holds.npy": (npy_header((9_000, 9_000)), "ValueError"),
        "negative.npy": (npy_header((-1, 9)) + bytes(90), "EmptyFile"),
        "thousands_of_bands.npy": (npy_header((9_000, 9_000, 9_000)), "TooManyPixels"),
        "thousands_of_bands.tif": (tiff_of(bands), "TooManyPixels"),
        "expanding_strip.tif": (_with_strip(deep, expanding), "TooManyPixels"),
        "very_many_scans.jpg": (jpeg_of_size(progressive[:-2], 9_000, 9_000) + scans, "TooManyScans"),
        "text_bomb.png": (png(9, 9, bytes(252), png_chunk(b"zTXt", b"Comment\0\0" + expanding)), "ValueError"),
        "text_bomb_of_all_languages.png": (
            png(9, 9, bytes(252), png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + expanding)), "ValueError"),
        "a_hundred_texts.png": (png(9, 9, bytes(252), *texts), "ValueError"),
        "profile_bomb.png": (png(9, 9, bytes(252), png_chunk(b"iCCP", b"profile\0\0" + expanding)), "ValueError"),
    }  # fmt: skip
    cases = broken | of_no_use | hostile
    return [Case(name, data, reason) for name, (data, reason) in cases.items()]


def _with_strip(data: bytes, strip: bytes) -> bytes:
    """A TIFF of one strip, with another in its place."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        offset, size = (file.pages[0].tags[tag].valueoffset for tag in (273, 279))
    return patched(patched(data, offset, struct.pack("<I", len(data))), size, struct.pack("<I", len(strip))) + strip
