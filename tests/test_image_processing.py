"""Both image processors: against torchvision's transforms, against Pillow, and against each other."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from hf_mae.image_processing_base_mae import center_spans, resize_bands, to_bands
from hf_mae.image_processing_mae import MAEImageProcessor
from hf_mae.image_processing_pil_mae import MAEImageProcessorPil

BACKENDS = [MAEImageProcessor, MAEImageProcessorPil]
BICUBIC = Image.Resampling.BICUBIC
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RAW = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
UINT8_STEP = 1 / 255 / min(STD) + 1e-5

both_backends = pytest.mark.parametrize("backend", BACKENDS, ids=["torchvision", "pil"])


def smooth_image(height: int, width: int, bands: int, dtype: str = "uint8") -> np.ndarray:
    """(H, W, C) waves that differ from band to band; over the whole range of the dtype, floats in [0, 1]."""
    rows, columns, band = np.meshgrid(range(height), range(width), range(bands), indexing="ij")
    waves = 0.5 + 0.5 * np.sin(rows / 5 + band) * np.cos(columns / (4 + band))
    return waves.astype(dtype) if dtype == "float32" else (waves * np.iinfo(dtype).max).astype(dtype)


def photo(height: int, width: int) -> Image.Image:
    """An RGB image of noise, where a filter's rounding and a crop's position show in every pixel."""
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(processor, images, **kwargs) -> torch.Tensor:
    return processor(images, return_tensors="pt", **kwargs)["pixel_values"]


def raw(backend, images, num_channels: int, **kwargs) -> torch.Tensor:
    return pixels(backend(num_channels=num_channels, **RAW), images, **kwargs)


# -- the reference transform ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(256, 256), (300, 401), (333, 257), (256, 259), (263, 256), (97, 61), (500, 224)])
def test_pillow_has_the_bits_of_the_reference_transform_torchvision_is_a_step_away(size):
    reference = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    image = photo(*size)
    expected = reference(image)[None]
    assert torch.equal(pixels(MAEImageProcessorPil(), image), expected)
    difference = (pixels(MAEImageProcessor(), image) - expected).abs()
    # both round between the two passes of the filter, so that of noise a pixel in 100,000 is two steps away
    assert (difference > UINT8_STEP).float().mean() < 1e-4
    assert difference.max() <= 2 * UINT8_STEP


@both_backends
@pytest.mark.parametrize("size", [(256, 259), (227, 231), (224, 225), (100, 300), (223, 151), (224, 224)])
def test_the_centre_crop_is_torchvisions_at_odd_margins_and_with_zeros_added(backend, size):
    image = photo(*size)
    expected = transforms.PILToTensor()(transforms.CenterCrop((224, 224))(image))
    assert torch.equal(pixels(backend(**RAW | {"do_center_crop": True}), image)[0], expected)


def test_half_of_an_odd_margin_is_rounded_to_the_even_pixel():
    starts = [center_spans(10 + margin, 10, {"height": 10, "width": 10})[0][0].start for margin in range(8)]
    assert starts == [0, 0, 1, 2, 2, 2, 3, 4]


@both_backends
def test_a_size_of_height_and_width_gives_an_image_that_is_not_square(backend):
    processor = backend(size={"height": 40, "width": 24}, do_center_crop=False)
    image = photo(64, 64)
    expected = (np.asarray(image.resize((24, 40), BICUBIC)) / 255 - MEAN) / STD
    ours = pixels(processor, image)
    assert ours.shape == (1, 3, 40, 24)
    assert np.abs(ours[0].numpy() - np.moveaxis(expected, -1, 0)).max() <= UINT8_STEP


@both_backends
def test_an_integer_size_is_the_shortest_edge(backend):
    assert dict(backend(size=224).size) == {"shortest_edge": 224}
    assert pixels(backend(size=32, do_center_crop=False), photo(64, 96)).shape == (1, 3, 32, 48)


# -- any number of bands --------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("bands", [1, 2, 6, 13])
def test_arrays_and_tensors_of_any_band_count_are_resized_scaled_and_normalised(backend, bands, dtype, place):
    mean, std = [0.1 * band for band in range(bands)], [1.0 + band for band in range(bands)]
    scale = {"uint8": 1 / 255, "uint16": 1 / 65535, "float32": 1.0}[dtype]
    processor = backend(num_channels=bands, size=32, crop_size=24, rescale_factor=scale, image_mean=mean, image_std=std)
    image = smooth_image(40, 50, bands, dtype)
    # the slow way: one band at a time as floats, the crop cut by hand out of (32, 40)
    slow = [
        np.asarray(Image.fromarray(image[..., band].astype(np.float32)).resize((40, 32), BICUBIC))
        for band in range(bands)
    ]
    expected = np.stack([(band[4:28, 8:32] * scale - m) / s for band, m, s in zip(slow, mean, std, strict=True)])
    given = image if place == "last" else np.moveaxis(image, -1, 0)
    for one in (given, torch.from_numpy(np.ascontiguousarray(given))):
        ours = pixels(processor, one)
        assert ours.shape == (1, bands, 24, 24)
        assert ours.dtype == torch.float32
        # the slow way does not round, as 8 bits do twice; uint16 rounds finer than the tolerance
        assert np.abs(ours[0].numpy() - expected).max() <= (1 / 255 if dtype == "uint8" else 1e-5) + 1e-5


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_the_backends_agree_on_noise_of_six_bands_up_to_one_step(dtype):
    noise = np.random.default_rng(0).random((6, 50, 70))
    scale = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    image = (noise * scale).astype(dtype)
    settings = {"num_channels": 6, "size": 32, "crop_size": 32, "do_normalize": False}
    torchvision, pil = (pixels(backend(**settings, rescale_factor=1 / scale), image) for backend in BACKENDS)
    step = 1 / scale if dtype != "float32" else 0
    assert (torchvision - pil).abs().max() <= step + 1e-5


@both_backends
def test_if_both_ends_have_the_band_count_the_first_is_taken_unless_stated(backend):
    image = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    assert np.array_equal(raw(backend, image, 3)[0], image)
    last = raw(backend, image, 3, input_data_format="channels_last")[0]
    assert np.array_equal(last, np.moveaxis(image, -1, 0))


@both_backends
def test_an_array_of_two_dimensions_is_one_band_alone_in_a_list_and_among_others(backend):
    image = np.arange(20, dtype=np.uint8).reshape(4, 5)
    assert np.array_equal(raw(backend, image, 1), image[None, None])
    batch = raw(backend, [image, torch.from_numpy(image), image[None], image[..., None]], 1)
    assert np.array_equal(batch, np.stack([image[None]] * 4))


@both_backends
def test_a_batch_array_and_nested_lists_become_one_flat_batch(backend):
    batch = np.arange(2 * 4 * 5 * 6, dtype=np.uint8).reshape(2, 4, 5, 6)
    expected = np.moveaxis(batch, -1, 1)
    for images in (batch, torch.from_numpy(batch), list(batch), [[batch[0]], [batch[1]]]):
        assert np.array_equal(raw(backend, images, 6), expected)


@both_backends
def test_a_list_of_mixed_sizes_and_kinds_is_one_batch_of_what_each_gives_alone(backend):
    array = np.array(photo(61, 47))
    images = [photo(50, 90), array, torch.from_numpy(array).movedim(-1, 0), array[..., 0]]
    processor = backend(size=32, crop_size=32)
    batch = pixels(processor, images)
    assert batch.shape == (4, 3, 32, 32)
    assert torch.equal(batch[1], batch[2])
    for image, row in zip(images, batch, strict=True):
        assert torch.equal(pixels(processor, image)[0], row)


@both_backends
def test_flipped_foreign_endian_and_read_only_arrays_are_read_like_any_other(backend):
    image = smooth_image(6, 7, 2, "uint16")
    image.flags.writeable = False
    expected = np.moveaxis(image, -1, 0)
    assert np.array_equal(raw(backend, image, 2)[0], expected)
    assert np.array_equal(raw(backend, image.astype(">u2"), 2)[0], expected)
    assert np.array_equal(raw(backend, image[:, ::-1], 2)[0], expected[:, :, ::-1])


@both_backends
@pytest.mark.parametrize("dtype", ["int16", "int64", "float64", "float16"])
def test_other_dtypes_become_float32_with_their_values_unchanged(backend, dtype):
    image = np.array([[[-3, 7], [300, 5]]], dtype=dtype)
    ours = raw(backend, image, 1)
    assert ours.dtype == torch.float32
    assert ours.flatten().tolist() == [-3.0, 7.0, 300.0, 5.0]


# -- bit depth ------------------------------------------------------------------------------------------


def test_all_65536_values_come_to_8_bits_by_rounding_and_back_by_257():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    eight = to_bands(values, 1, 1 / 255)[0]
    assert eight.dtype == torch.uint8
    assert np.array_equal(eight, np.rint(values / 257))
    sixteen = to_bands(np.arange(256, dtype=np.uint8).reshape(16, 16), 1, 1 / 65535)[0]
    assert sixteen.flatten().tolist() == [257 * value for value in range(256)]


@both_backends
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_grey_images_of_16_bits_are_scaled_to_an_8_bit_model_and_not_clipped(backend, mode, num_channels):
    values = np.array([[0, 255, 257], [30000, 65278, 65535]])
    array = values.astype({"I;16": "<u2", "I;16B": ">u2", "I": "int32"}[mode])
    image = Image.frombytes(mode, (3, 2), array.tobytes())
    processor = backend(num_channels=num_channels, do_resize=False, do_center_crop=False, do_normalize=False)
    expected = np.array([[0, 1, 1], [117, 254, 255]]) / 255
    assert np.allclose(pixels(processor, image), np.stack([expected] * num_channels))
    assert np.array_equal(raw(backend, image, num_channels), np.stack([values] * num_channels)[None])


@both_backends
def test_8_and_16_bit_images_of_one_scene_give_one_input_to_a_16_bit_model(backend):
    eight = smooth_image(8, 8, 1)
    processor = backend(num_channels=1, rescale_factor=1 / 65535, **RAW | {"do_rescale": True})
    batch = pixels(processor, [eight, eight.astype(np.uint16) * 257, Image.fromarray(eight[..., 0])])
    assert np.allclose(batch, eight[..., 0] / 255)


@both_backends
@pytest.mark.parametrize("rescale_factor", [1 / 255, 1 / 65535, 1.0])
def test_floats_are_left_as_they_are_by_every_model(backend, rescale_factor):
    image = np.array([[0.5, -2.0], [70000.0, 1.0]], dtype=np.float32)
    processor = backend(num_channels=1, rescale_factor=rescale_factor, **RAW | {"do_rescale": True})
    for one in (image, torch.from_numpy(image), Image.fromarray(image)):
        assert np.allclose(pixels(processor, one), image * rescale_factor)


@both_backends
def test_a_resized_16_bit_edge_is_rounded_and_clamped_to_16_bits(backend):
    edge = np.zeros((1, 16, 16), dtype=np.uint16)
    edge[:, :, 8:] = 65535
    for image in (edge, torch.from_numpy(edge)):
        ours = raw(backend, image, 1, do_resize=True, size={"height": 40, "width": 40})
        assert ours.dtype == torch.uint16
        assert (ours.int().min(), ours.int().max()) == (0, 65535)


@both_backends
def test_16_bits_are_not_scaled_where_the_model_does_not_rescale(backend):
    image = np.array([[[0, 300], [40000, 65535]]], dtype=np.uint16)
    processor = backend(num_channels=1, image_mean=100.0, image_std=2.0, **RAW | {"do_normalize": True})
    assert pixels(processor, image).flatten().tolist() == [-50.0, 100.0, 19950.0, 32717.5]


# -- Pillow images and RGB ------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_8_bit_modes_without_alpha_are_converted_by_pillow(backend, mode, num_channels):
    image = photo(5, 6).convert(mode)
    expected = np.asarray(image.convert("L" if num_channels == 1 else "RGB")).reshape(5, 6, num_channels)
    assert np.array_equal(raw(backend, image, num_channels)[0], np.moveaxis(expected, -1, 0))


@both_backends
@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "array", "uint16 array", "float array"])
def test_alpha_is_composited_on_white(backend, kind):
    # opaque, half transparent, transparent; grey, so that every kind can hold them
    rgba = np.array([[[100, 100, 100, 255], [100, 100, 100, 53], [100, 100, 100, 0]]], dtype=np.uint8)
    rgba = np.repeat(rgba, 5, axis=0)  # five rows: a side of 1 would be taken for a single band
    expected = [100, 222.78, 255]  # 100 * 53 / 255 + 255 * 202 / 255 = 222.78; integers are rounded
    image = {
        "RGBA": lambda: Image.fromarray(rgba),
        "LA": lambda: Image.fromarray(rgba).convert("LA"),
        "P": lambda: Image.fromarray(rgba[:, :, 0]).convert("P"),
        "array": lambda: rgba,
        "uint16 array": lambda: rgba.astype(np.uint16) * 257,
        "float array": lambda: (rgba / 255).astype(np.float32),
    }[kind]()
    if kind == "P":
        image.info["transparency"] = image.getpixel((0, 0))
        expected = [255, 255, 255]
    ours = raw(backend, image, 3)[0].double() / {"uint16 array": 257, "float array": 1 / 255}.get(kind, 1)
    assert np.allclose(ours, np.array(expected)[None, None], atol=0.01 if kind == "float array" else 0.5)


@both_backends
def test_one_band_is_repeated_for_rgb_and_four_bands_lose_their_alpha(backend):
    grey = np.arange(30, dtype=np.uint8).reshape(6, 5)
    for image in (grey, grey[None], grey[..., None], torch.from_numpy(grey)):
        assert np.array_equal(raw(backend, image, 3)[0], np.stack([grey] * 3))
    four_rows = grey[:4, :, None]  # the single band is believed before the four
    assert np.array_equal(raw(backend, four_rows, 3)[0], np.stack([grey[:4]] * 3))
    rgba = np.dstack([grey, grey + 1, grey + 2, np.full_like(grey, 255)])
    for image in (rgba, np.moveaxis(rgba, -1, 0)):
        assert np.array_equal(raw(backend, image, 3)[0], np.moveaxis(rgba[..., :3], -1, 0))


@both_backends
@pytest.mark.parametrize("mode", ["RGBA", "CMYK"])
def test_four_channels_take_rgba_and_cmyk_images_as_they_are(backend, mode):
    image = photo(5, 6).convert(mode)
    assert np.array_equal(raw(backend, image, 4)[0], np.moveaxis(np.asarray(image), -1, 0))


@both_backends
def test_files_are_turned_upright_and_keep_their_16_bits(backend, tmp_path):
    deep = Image.fromarray(np.array([[0, 300, 65535]], dtype=np.uint16))
    deep.save(tmp_path / "deep.png")
    assert raw(backend, str(tmp_path / "deep.png"), 1).flatten().tolist() == [0, 300, 65535]
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: rotate by 90 degrees to see it
    photo(5, 9).save(tmp_path / "turned.png", exif=turned)
    assert raw(backend, [str(tmp_path / "turned.png")], 3).shape == (1, 3, 9, 5)


# -- settings -------------------------------------------------------------------------------------------


@both_backends
def test_a_single_mean_and_std_serve_every_channel(backend):
    image = smooth_image(4, 4, 6)
    for mean, std in ((0.5, 0.25), ([0.5], [0.25])):
        processor = backend(num_channels=6, image_mean=mean, image_std=std, do_resize=False, do_center_crop=False)
        assert np.allclose(pixels(processor, image)[0], np.moveaxis((image / 255 - 0.5) / 0.25, -1, 0))


def test_a_saved_processor_comes_back_whole_and_gives_the_same_pixels(tmp_path):
    settings = {
        "num_channels": 5,
        "rescale_factor": 1 / 65535,
        "image_mean": [0.1, 0.2, 0.3, 0.4, 0.5],
        "image_std": [1.0, 1.1, 1.2, 1.3, 1.4],
        "size": {"height": 40, "width": 48},
        "crop_size": {"height": 32, "width": 24},
        "resample": Image.Resampling.BILINEAR,
    }
    image = smooth_image(50, 60, 5, "uint16")
    for backend in BACKENDS:
        built = backend(**settings)
        built.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert {name: saved[name] for name in settings} == settings
        assert saved["image_processor_type"] == "MAEImageProcessor"
        for reader in BACKENDS:
            loaded = reader.from_pretrained(tmp_path)
            assert loaded.to_dict() == reader(**settings).to_dict()
            assert torch.equal(pixels(loaded, image), pixels(reader(**settings), image))


@both_backends
def test_the_number_of_channels_may_be_set_for_one_call(backend):
    processor = backend(do_normalize=False)
    assert pixels(processor, smooth_image(40, 40, 13), num_channels=13).shape == (1, 13, 224, 224)
    assert processor.num_channels == 3


@both_backends
def test_the_defaults_are_the_references_and_no_num_channels_means_three(backend, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"feature_extractor_type": "ViT", "size": 224}')
    old = backend.from_pretrained(tmp_path)
    assert (old.num_channels, dict(old.size), dict(old.crop_size)) == (
        3,
        {"shortest_edge": 224},
        {"height": 224, "width": 224},
    )
    processor = backend()
    assert (processor.image_mean, processor.image_std) == (MEAN, STD)
    assert (processor.resample, processor.rescale_factor) == (BICUBIC, 1 / 255)
    assert processor.model_input_names == ["pixel_values"]


def test_gradients_reach_a_float_image_through_the_torchvision_backend():
    image = torch.rand(3, 40, 40, requires_grad=True)
    pixels(MAEImageProcessor(size=32, crop_size=32), image).sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


# -- resize_bands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [None, (3.5, 2.0, 30.25, 21.0)])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 13])
def test_uint8_bands_are_resized_to_the_bits_that_pillow_gives_in_an_rgb_image(bands, box):
    image = np.random.default_rng(0).integers(0, 256, (24, 32, bands), dtype=np.uint8)
    ours = resize_bands(image, (17, 40), BICUBIC, box)
    assert ours.shape == (17, 40, bands)
    for band in range(bands):
        as_rgb = Image.fromarray(np.repeat(image[..., band, None], 3, axis=-1)).resize((40, 17), BICUBIC, box)
        assert np.array_equal(ours[..., band], np.asarray(as_rgb)[..., 1])


@pytest.mark.parametrize("box", [None, (3.5, 2.0, 30.25, 21.0)])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("bands", [1, 3, 6])
def test_bands_of_more_bits_are_resized_as_pillow_resizes_floats(bands, dtype, box):
    image = (np.random.default_rng(0).random((24, 32, bands)) * 65535).astype(dtype)
    ours = resize_bands(image, (17, 40), BICUBIC, box)
    assert ours.dtype == dtype
    for band in range(bands):
        as_float = Image.fromarray(image[..., band].astype(np.float32)).resize((40, 17), BICUBIC, box)
        expected = np.asarray(as_float)
        if dtype == "uint16":
            expected = np.clip(np.rint(expected), 0, 65535)
        assert np.array_equal(ours[..., band], expected)


# -- errors ---------------------------------------------------------------------------------------------


def fails(message: str):
    """A ValueError of one line that contains `message`."""
    return pytest.raises(ValueError, match=rf"(?s)\A(?!.*\n).*{re.escape(message)}")


@both_backends
@pytest.mark.parametrize(
    ("num_channels", "shape", "message"),
    [
        (6, (5, 7, 9), "shape (5, 7, 9) does not have num_channels=6 bands on its first or last axis; move"),
        (6, (7, 9), "shape (7, 9) does not have num_channels=6 bands on its first or last axis; move"),
        (1, (7, 9, 3), "(7, 9, 3) does not have num_channels=1 bands on its first or last axis; convert"),
        (3, (2, 7, 9), "shape (2, 7, 9) does not have num_channels=3 bands"),
        (3, (1, 2, 3, 7, 9), "shape (1, 2, 3, 7, 9) does not have num_channels=3 bands"),
        (3, (9,), "shape (9,) does not have num_channels=3 bands"),
    ],
)
def test_a_shape_without_the_band_count_is_refused_with_the_remedy(backend, num_channels, shape, message):
    with fails(message):
        raw(backend, np.zeros(shape, dtype=np.uint8), num_channels)


@both_backends
def test_a_named_layout_is_taken_at_its_word(backend):
    with fails("shape (6, 7, 9) does not have num_channels=6 bands on its last axis; move"):
        raw(backend, np.zeros((6, 7, 9)), 6, input_data_format="channels_last")


@both_backends
@pytest.mark.parametrize(("num_channels", "mode"), [(2, "LA"), (4, "RGB"), (13, "RGB"), (6, "I;16")])
def test_a_pillow_image_that_cannot_hold_the_bands_is_refused(backend, num_channels, mode):
    image = Image.new(mode, (4, 4))
    message = (
        f"a Pillow image of mode {mode} cannot give num_channels={num_channels} bands; "
        f"pass an array of shape ({num_channels}, height, width)"
    )
    with fails(message):
        raw(backend, image, num_channels)


@both_backends
def test_nothing_is_converted_to_rgb_where_that_is_switched_off(backend):
    assert raw(backend, photo(4, 4), 3, do_convert_rgb=False).shape == (1, 3, 4, 4)
    with fails("mode L does not have the num_channels=3 bands of RGB; pass do_convert_rgb=True"):
        raw(backend, Image.new("L", (4, 4)), 3, do_convert_rgb=False)
    with fails("shape (1, 4, 4) does not have num_channels=3 bands"):
        raw(backend, np.zeros((1, 4, 4)), 3, do_convert_rgb=False)


@both_backends
def test_an_integer_image_beyond_16_bits_is_refused(backend):
    image = Image.fromarray(np.array([[-5, 70000]], dtype=np.int32))
    with fails("mode I has values from -5 to 70000, beyond the 16 bits 0..65535; pass it as a float32 array"):
        raw(backend, image, 1)


@both_backends
def test_a_float_rgba_image_beyond_the_unit_range_is_refused(backend):
    with fails("values from 0 to 255, beyond [0, 1]; pass its three colour bands, or all four as uint8"):
        raw(backend, np.array([0.0, 1.0, 2.0, 255.0])[:, None, None].repeat(5, axis=1).repeat(5, axis=2), 3)


@both_backends
@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_a_mean_or_std_of_another_length_is_refused_when_called_and_not_before(backend, name):
    image = np.zeros((13, 8, 8), dtype=np.uint8)
    mean_and_std = {"image_mean": [0.5] * 13, "image_std": [0.5] * 13} | {name: [0.5] * 3}
    processor = backend(num_channels=13, **mean_and_std)
    with fails(f"{name} has 3 entries but num_channels is 13; pass 13 (`hf-mae inspect` computes them"):
        processor(image)
    with fails("image_mean has 3 entries but num_channels is 13"):
        backend(num_channels=13)(image)
    assert processor(image, do_normalize=False, return_tensors="pt")["pixel_values"].shape[1] == 13


@both_backends
def test_sizes_of_other_keys_are_refused(backend):
    with fails("size is {'longest_edge': 32}; pass {'shortest_edge': N} or {'height': H, 'width': W}"):
        backend(size={"longest_edge": 32})(photo(8, 8))
    with fails("crop_size is {'shortest_edge': 32}; pass {'height': H, 'width': W}"):
        backend(crop_size={"shortest_edge": 32})(photo(8, 8))


@both_backends
def test_a_line_of_pixels_that_would_become_gigabytes_is_refused(backend):
    with fails("an image of 1 x 65535 pixels would be resized to 256 x 16776960, beyond PIL.Image.MAX_IMAGE_PIXELS"):
        backend()(np.zeros((1, 65535, 3), dtype=np.uint8))
    assert backend()(np.zeros((1, 300, 3), dtype=np.uint8), return_tensors="np")["pixel_values"].shape[-1] == 224


@pytest.mark.parametrize(("shape", "dtype"), [((4, 4), "uint8"), ((4, 4, 1), "int16")])
def test_resize_bands_refuses_other_shapes_and_dtypes(shape, dtype):
    with fails(f"resize_bands got shape {shape} and dtype {dtype}; pass (height, width, bands) as uint8"):
        resize_bands(np.zeros(shape, dtype), (2, 2), BICUBIC)
