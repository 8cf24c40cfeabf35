import io
import pickle
import random
from importlib.util import find_spec

import numpy as np
import pytest
import tifffile
from bad_images import encoded, npy, tiff
from PIL import Image, ImageFile

from hf_mae.data import decode as decode_module
from hf_mae.data.decode import BadImage, decode_image, probe_image

pytestmark = [
    # What Pillow says of broken files on the way to its exception.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 12)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def bad_reason(data, num_channels: int = 3, dtype: str = "uint8") -> str:
    with pytest.raises(BadImage) as caught:
        decode_image(data, num_channels, dtype)
    return caught.value.reason


# ---------------------------------------------------------------------------------------- good images


@pytest.mark.parametrize(
    ("mode", "format"),
    [("RGB", "PNG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("RGB", "JPEG"),
     ("CMYK", "JPEG"), ("L", "JPEG"), ("RGBA", "WEBP"), ("P", "GIF"), ("RGB", "BMP"), ("RGB", "TIFF"), ("RGBA", "TIFF"),
     ("L", "PPM")],
)  # fmt: skip
@pytest.mark.parametrize("num_channels", [1, 3])
def test_every_common_mode_becomes_what_pillow_converts_it_to(mode, format, num_channels):
    data = encoded(picture(mode), format)
    wanted = Image.open(io.BytesIO(data)).convert("RGB" if num_channels == 3 else "L")
    image = decode_image(data, num_channels)
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == (wanted.mode, wanted.size)
    assert image.tobytes() == wanted.tobytes()
    assert probe_image(data) == (1 if mode in ("1", "L") else 3, "uint8")


def test_transparency_is_composited_on_white_unless_four_channels_are_wanted():
    image = Image.new("RGBA", (2, 2), (200, 100, 50, 51))
    # A fifth of the colour and four fifths of white; 0.299 * 244 + 0.587 * 224 + 0.114 * 214 = 228.8
    assert decode_image(encoded(image), 3).getpixel((0, 0)) == (244, 224, 214)
    assert decode_image(encoded(image), 1).getpixel((0, 0)) == 229
    assert decode_image(encoded(image), 4).tolist() == np.asarray(image).tolist()


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        assert decode_image(data, 3).getpixel((4, 4)) == (255, 0, 0)


def test_a_jpeg_is_decoded_at_the_smallest_scale_that_keeps_the_pixels_asked_for():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 11, 3), dtype=np.uint8))
    photo = photo.resize((400, 304), Image.Resampling.BICUBIC)
    data = encoded(photo, "JPEG", quality=95)
    for pixels, size in [
        (None, (400, 304)), (10**9, (400, 304)), (200 * 152 + 1, (400, 304)), (200 * 152, (200, 152)),
        (100 * 76, (100, 76)), (1, (50, 38)),
    ]:  # fmt: skip
        image = np.asarray(decode_image(data, 3, min_pixels=pixels))
        assert image.shape == (*size[::-1], 3)
        expected = decode_image(data, 3).resize(size, Image.Resampling.BOX)
        assert np.abs(image.astype(int) - np.asarray(expected)).mean() < 1.5
    assert np.shape(decode_image(encoded(photo.convert("L"), "JPEG"), 3, min_pixels=1)) == (38, 50, 3)
    assert decode_image(encoded(photo), 3, min_pixels=1).size == (400, 304)  # a PNG
    assert np.shape(decode_image(encoded(photo.resize((3000, 1)), "JPEG"), 3, min_pixels=1)) == (1, 3000, 3)
    assert bad_reason(data[: len(data) // 2]) == "OSError"
    with pytest.raises(BadImage):
        decode_image(data[: len(data) // 2], 3, min_pixels=1)


def test_sixteen_bit_gray_is_scaled_not_clipped():
    values = np.array([[0, 128, 129, 257], [514, 32_768, 65_406, 65_535]], dtype=np.uint16)
    scaled = np.rint(values / 257).astype(np.uint8)
    files = [encoded(Image.fromarray(values)), encoded(Image.fromarray(values), "TIFF"), npy(values), tiff(values)]
    big_endian = [tiff(values, byteorder=">"), npy(values.astype(">u2")), values.astype(">u2")]
    for data in [*files, *big_endian]:
        assert probe_image(data) == (1, "uint16")
        assert np.array_equal(decode_image(data, 1), scaled)
        assert np.array_equal(np.asarray(decode_image(data, 3))[:, :, 2], scaled)
        assert np.array_equal(decode_image(data, 1, "uint16")[:, :, 0], values)
        assert np.array_equal(decode_image(data, 3, "float32")[:, :, 1], values.astype(np.float32))


def test_eight_bits_become_sixteen_by_257_and_float_by_nothing():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = encoded(Image.fromarray(values))
    assert np.array_equal(decode_image(data, 1, "uint16")[:, :, 0], values.astype(np.uint16) * 257)
    assert np.array_equal(decode_image(data, 1, "float32")[:, :, 0], values.astype(np.float32))
    back = decode_image(decode_image(data, 1, "uint16"), 1)
    assert np.array_equal(back, values)


def test_a_32_bit_image_of_pillow_is_taken_as_16_bits_unless_it_holds_more():
    fits = Image.fromarray(np.array([[0, 65_535]], dtype=np.int32))
    assert np.asarray(decode_image(encoded(fits, "TIFF"), 1)).tolist() == [[0, 255]]
    wide = Image.fromarray(np.array([[0, 65_536]], dtype=np.int32))
    assert bad_reason(encoded(wide, "TIFF"), 1) == "WrongDtype"
    assert decode_image(encoded(wide, "TIFF"), 1, "float32").ravel().tolist() == [0.0, 65_536.0]


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize(("bands", "dtype"), [(13, "uint16"), (6, "float32"), (4, "uint8"), (3, "uint16")])
def test_multi_band_tiff_and_npy_are_read_with_either_axis_order(bands, dtype, channels_first):
    array = np.random.default_rng(0).integers(0, 200, (20, 24, bands)).astype(dtype)
    stored = np.ascontiguousarray(np.moveaxis(array, -1, 0)) if channels_first else array
    planar = "separate" if channels_first else "contig"
    for data in (tiff(stored, photometric="minisblack", planarconfig=planar), npy(stored), stored):
        assert probe_image(data) == (bands, dtype)
        image = decode_image(data, bands, dtype)
        assert image.dtype == dtype
        assert np.array_equal(image, array)


def test_a_tiff_of_one_band_pages_is_a_stack_where_that_many_channels_are_wanted():
    pages = np.arange(5 * 6 * 7, dtype=np.uint16).reshape(5, 6, 7)
    assert probe_image(tiff(pages)) == (5, "uint16")
    assert np.array_equal(decode_image(tiff(pages), 5, "uint16"), np.moveaxis(pages, 0, -1))
    assert np.array_equal(decode_image(tiff(pages), 1, "uint16")[:, :, 0], pages[0])


def test_where_both_ends_have_the_channel_count_the_first_axis_is_the_channels():
    array = np.random.default_rng(0).integers(0, 255, (3, 5, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(array, 3), np.moveaxis(array, 0, -1))


def test_one_band_is_repeated_for_colour_and_arrays_become_pillow_images():
    array = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    gray, colour = decode_image(array, 1), decode_image(array, 3)
    assert (gray.mode, colour.mode) == ("L", "RGB")
    assert np.array_equal(np.asarray(colour), np.repeat(array, 3, axis=2))
    assert decode_image(np.zeros((3, 9), np.uint8), 3).size == (9, 3)  # a height of 3 is not three channels


def test_plain_integers_are_values_of_the_dtype_asked_for():
    array = np.array([[0, 200], [255, 3]])
    assert probe_image(array) == (1, "uint8")
    assert np.array_equal(decode_image(array, 1), array)
    assert bad_reason(array + 1, 1) == "WrongDtype"
    assert bad_reason(-array, 1) == "WrongDtype"
    assert probe_image(array * 100) == (1, "uint16")
    assert probe_image(-array) == (1, "float32")
    assert np.asarray(decode_image(np.array([[True, False]]), 1)).tolist() == [[255, 0]]


def test_the_array_returned_is_writable_and_no_view_of_a_mapped_file(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((4, 4, 5), np.float32))
    image = decode_image(np.load(tmp_path / "a.npy", mmap_mode="r"), 5, "float32")
    assert type(image) is np.ndarray
    assert image.flags.writeable


# ---------------------------------------------------------------------------------------- the extra decoder


@pytest.fixture
def by_pillow(monkeypatch):
    """`decode_image` for a training crop, by Pillow alone."""
    pytest.importorskip("simplejpeg", reason="without simplejpeg, Pillow decodes everything")

    def decode(data, num_channels, min_pixels):
        with monkeypatch.context() as without:
            without.setattr(decode_module, "simplejpeg", None)
            return decode_image(data, num_channels, min_pixels=min_pixels)

    return decode


@pytest.mark.parametrize("size", [(401, 303), (64, 48), (7, 9), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"subsampling": 2}, {"subsampling": 1, "quality": 30}, {"progressive": True}])
def test_the_extra_decoder_gives_the_bits_of_pillow_at_every_scale(size, options, by_pillow):
    for mode, channels in (("RGB", 3), ("L", 3), ("L", 1)):
        data = encoded(picture().resize(size, Image.Resampling.BICUBIC).convert(mode), "JPEG", **options)
        for part in (1, 2, 3.9, 4, 8, 100):
            min_pixels = max(64, int(size[0] * size[1] / part**2))
            image = decode_image(data, channels, min_pixels=min_pixels)
            assert isinstance(image, np.ndarray)  # the extra's; Pillow's would be an image
            expected = np.asarray(by_pillow(data, channels, min_pixels))
            assert np.array_equal(image if channels == 3 else image[:, :, 0], expected)


def test_what_the_extra_decoder_is_not_for_is_left_to_pillow(by_pillow):
    photo = picture(size=(32, 24))
    for data in (encoded(photo.convert("CMYK"), "JPEG"), encoded(photo, "JPEG", keep_rgb=True), encoded(photo)):
        image = decode_image(data, 3, min_pixels=64)
        assert isinstance(image, Image.Image)
        assert image.tobytes() == by_pillow(data, 3, 64).tobytes()
    jpeg = encoded(photo, "JPEG")
    assert decode_image(jpeg, 1, min_pixels=64).mode == "L"
    assert isinstance(decode_image(jpeg, 3), Image.Image)
    assert decode_image(jpeg, 3, "uint16", min_pixels=64).dtype == np.uint16


def test_the_extra_decoder_is_not_asked_for_an_image_whose_header_claims_too_much(by_pillow, monkeypatch):
    data = bytearray(encoded(picture(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (60_000).to_bytes(2, "big") * 2
    monkeypatch.setattr(decode_module.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("it was"))
    for decode in (lambda data, channels, pixels: decode_image(data, channels, min_pixels=pixels), by_pillow):
        with pytest.raises(BadImage) as caught:
            decode(bytes(data), 3, 1)
        assert caught.value.reason == "TooManyPixels"


# ---------------------------------------------------------------------------------------- bad images


def test_the_size_of_arrays_is_checked():
    assert bad_reason(np.broadcast_to(np.uint8(0), (70_000, 2)), 1) == "TooManyPixels"
    assert bad_reason(np.broadcast_to(np.uint8(0), (9_000, 1_000, 1_000)), 3) == "TooManyPixels"
    assert bad_reason(np.zeros((0, 4), np.uint8), 1) == "EmptyFile"


def test_an_npy_file_with_pickled_objects_is_refused_unread(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    stream = io.BytesIO()
    np.save(stream, np.array([[Evil()]], dtype=object), allow_pickle=True)
    assert bad_reason(stream.getvalue(), 1) == "ValueError"
    assert bad_reason(np.array([[None]]), 1) == "WrongDtype"
    assert not (tmp_path / "canary").exists()


def test_a_wrong_channel_count_is_named_with_the_one_asked_for():
    with pytest.raises(BadImage, match=r"\(8, 8, 5\) has no axis of 3 channels") as caught:
        decode_image(np.zeros((8, 8, 5), np.uint8), 3)
    assert caught.value.reason == "WrongChannels"
    assert bad_reason(encoded(picture()), 13) == "WrongChannels"
    assert bad_reason(np.zeros((2, 2, 2, 2), np.uint8)) == "WrongChannels"


def test_floats_do_not_become_integers():
    floats = np.random.default_rng(0).random((4, 4)).astype(np.float32)
    for data in (npy(floats), tiff(floats)):
        assert probe_image(data) == (1, "float32")
        assert np.array_equal(decode_image(data, 1, "float32")[:, :, 0], floats)
        assert bad_reason(data, 1, "uint8") == bad_reason(data, 3, "uint16") == "WrongDtype"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("pack", [npy, tiff, np.asarray])
def test_an_image_without_any_finite_value_is_bad_and_one_with_some_is_read_as_it_is(value, pack):
    with pytest.raises(BadImage, match="every pixel is NaN or infinite") as caught:
        decode_image(pack(np.full((4, 5), value, np.float32)), 1, "float32")
    assert caught.value.reason == "NotFinite"
    some = np.array([[value, 1.5], [0.0, value]], np.float32)
    assert np.array_equal(decode_image(pack(some), 1, "float32")[:, :, 0], some, equal_nan=True)


def test_float64_values_beyond_float32_are_infinite():
    assert decode_image(np.array([[1e300, 0.1]]), 1, "float32").ravel().tolist() == [np.inf, np.float32(0.1)]
    assert bad_reason(np.full((2, 2), 1e300), 1, "float32") == "NotFinite"


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "float16", "float64"])
@pytest.mark.parametrize("low", [-100, 0])
def test_signed_wide_and_float_arrays_are_float32_whatever_their_values(dtype, low):
    if dtype == "uint32" and low < 0:
        low = 2**32 - 256  # float32 holds multiples of 256 here
    values = np.array([[low, 5], [7, 100]]).astype(dtype)
    for data in (
        values,
        npy(values),
        npy(np.asfortranarray(values)),
        npy(values.astype(values.dtype.newbyteorder(">"))),
    ):
        assert probe_image(data) == (1, "float32")
        assert np.array_equal(decode_image(data, 1, "float32")[:, :, 0].astype(np.float64), values.astype(np.float64))


def test_booleans_are_0_and_255():
    mask = np.eye(4, dtype=bool)
    for data in (mask, npy(mask), encoded(Image.fromarray(mask)), encoded(Image.fromarray(mask), "TIFF")):
        assert probe_image(data) == (1, "uint8")
        assert np.array_equal(np.asarray(decode_image(data, 1)), np.eye(4) * 255)


def test_the_exception_keeps_its_cause_and_survives_pickling():
    with pytest.raises(BadImage) as caught:
        decode_image(b"hello", 3)
    assert type(caught.value.__cause__).__name__ == "UnidentifiedImageError"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.reason, str(copy)) == (caught.value.reason, str(caught.value))


def test_running_out_of_memory_on_an_image_is_a_bad_image(monkeypatch):
    def load(*_):
        raise MemoryError

    data = encoded(picture())
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert bad_reason(data) == "MemoryError"


def test_a_dtype_that_does_not_exist_is_the_users_mistake_not_a_bad_image():
    with pytest.raises(ValueError, match="'int8' is not supported: use one of uint8") as caught:
        decode_image(b"", 3, "int8")
    assert not isinstance(caught.value, BadImage)


def test_a_missing_tifffile_is_named_with_the_command_that_installs_it(monkeypatch):
    data = tiff(np.zeros((8, 8, 13), np.uint16))
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ImportError, match="pip install tifffile"):
        decode_image(data, 13, "uint16")


@pytest.mark.skipif(find_spec("imagecodecs") is not None, reason="imagecodecs is installed, so that nothing is missing")
@pytest.mark.parametrize("compression", [5, 32773])  # LZW, PackBits
def test_a_compression_that_needs_imagecodecs_costs_one_image(compression):
    data = bytearray(tiff(np.zeros((8, 8, 13), np.uint16), compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        at = file.pages[0].tags["Compression"].valueoffset
    data[at : at + 2] = compression.to_bytes(2, "little")
    with pytest.raises(BadImage, match="pip install imagecodecs") as caught:
        decode_image(bytes(data), 13, "uint16")
    assert caught.value.reason == "NeedsImagecodecs"


@pytest.mark.parametrize("compression", ["zlib", "lzma"])
def test_compressed_tiffs_are_read_whole_whatever_their_strips_and_tiles(compression):
    array = np.random.default_rng(0).integers(0, 65_535, (70, 50, 13)).astype(np.uint16)
    for options in ({"rowsperstrip": 16}, {"tile": (32, 32)}, {"tile": (128, 128)}, {}):
        for planar, stored in (("contig", array), ("separate", np.ascontiguousarray(np.moveaxis(array, -1, 0)))):
            data = tiff(stored, photometric="minisblack", planarconfig=planar, compression=compression, **options)
            assert np.array_equal(decode_image(data, 13, "uint16"), array)


def test_what_a_source_has_in_place_of_an_image_is_raised_each_time_anew():
    fault = BadImage("gone", "NoBytes")
    for function in (probe_image, lambda data: decode_image(data, 3)):
        with pytest.raises(BadImage, match="gone") as caught:
            function(fault)
        assert caught.value.reason == "NoBytes"
        assert caught.value is not fault
    assert fault.__traceback__ is None


def test_mutated_files_raise_bad_image_and_nothing_else():
    originals = [
        encoded(picture(), format) for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
    ]
    array = np.random.default_rng(0).integers(0, 255, (12, 12, 13)).astype(np.uint16)
    originals += [tiff(array), npy(array)]
    rng = random.Random(0)
    outcomes = {"decoded": 0, "bad": 0}
    for number in range(300):
        data = bytearray(originals[number % len(originals)])
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for channels, dtype in ((3, "uint8"), (13, "uint16")):
            try:
                decode_image(bytes(data), channels, dtype)
                outcomes["decoded"] += 1
            except BadImage:
                outcomes["bad"] += 1
    assert min(outcomes.values()) > 100
