import math

import numpy as np
import pytest
import torch
from memory_source import random_image
from PIL import Image

from hf_mae import MAEImageProcessor, MAEImageProcessorPil
from hf_mae.data import transform
from hf_mae.data.augment import sample_rng, training_view
from hf_mae.data.transform import (
    crop_settings,
    evaluation_view,
    find_no_data,
    make_normalizer,
    pixel_dtype,
    resize_before_crop,
)


@pytest.mark.parametrize(
    ("height", "width"), [(40, 60), (61, 40), (33, 47), (47, 33), (257, 31), (31, 31), (20, 101), (35, 36)]
)
@pytest.mark.parametrize(
    ("size", "crop_pct"), [((32, 32), 0.875), ((24, 24), 1.0), ((15, 15), 0.77), ((16, 40), 0.875), ((25, 11), 0.9)]
)
@pytest.mark.parametrize("kind", ["RGB", "L", "13 bands"])
def test_the_evaluation_view_has_the_bits_of_the_image_processor(height, width, size, crop_pct, kind):
    if kind == "13 bands":
        channels, image = 13, random_image(height, width, 13, np.uint16)
    else:
        channels, image = (3, 1)[kind == "L"], Image.fromarray(random_image(height, width)).convert(kind)
    processor = MAEImageProcessorPil(
        num_channels=channels, **crop_settings(size, crop_pct), do_rescale=False, do_normalize=False
    )
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    view = evaluation_view(image, resize_before_crop(size, crop_pct), size)
    assert view.shape == expected.shape == (channels, *size)
    assert view.dtype == (np.uint16 if channels == 13 else np.uint8)
    assert np.array_equal(view, expected)


@pytest.mark.parametrize(("height", "width"), [(2, 403), (403, 2), (1, 5_000), (5_001, 1)])
def test_of_very_long_images_the_middle_is_seen_as_the_image_processor_shows_it(height, width):
    along = np.arange(max(height, width)) % 256 if max(height, width) < 500 else np.arange(max(height, width)) / 20
    array = np.broadcast_to(along.reshape((height, 1) if height > width else (1, width)), (height, width))
    image = Image.fromarray(array.astype(np.uint8))
    processor = MAEImageProcessorPil(
        num_channels=1, size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}, do_rescale=False,
        do_normalize=False,
    )  # fmt: skip
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(evaluation_view(image, 20, (16, 16)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["RGB", "L", "13 bands"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5_000), (65_535, 1), (2, 44_000)])
def test_images_of_extreme_shapes_have_both_views_and_take_little_memory(monkeypatch, height, width, kind):
    image = (
        np.ones((height, width, 13), np.float32) if kind == "13 bands" else Image.new(kind, (width, height), "white")
    )
    sizes = []
    resize = transform._resize
    monkeypatch.setattr(transform, "_resize", lambda image, size, *how: sizes.append(size) or resize(image, size, *how))
    channels, white = {"RGB": (3, 255), "L": (1, 255), "13 bands": (13, 1)}[kind]
    for view in (
        evaluation_view(image, 16, (14, 14)),
        evaluation_view(image, (16, 20), (14, 14)),
        *(training_view(image, sample_rng(0, 0, 0, number), (14, 14)) for number in range(20)),
    ):
        assert view.shape == (channels, 14, 14)
        assert np.allclose(view, white)
    assert max(map(math.prod, sizes)) <= 16 * 16 * 101  # one more, where that keeps the middle in the middle


def test_what_is_resized_to_before_the_crop():
    assert resize_before_crop((224, 224), 0.875) == 256
    assert resize_before_crop((448, 448), 1.0) == 448
    assert resize_before_crop((208, 320), 0.8) == (260, 400)
    assert resize_before_crop((32, 32), 0.875) == 36  # 36.57
    assert resize_before_crop((224, 224), 224 / 248) == 248


@pytest.mark.parametrize(("factor", "dtype"), [(1 / 255, "uint8"), (1 / 65535, "uint16"), (None, "float32")])
def test_a_processor_tells_which_pixels_it_was_made_for(factor, dtype):
    rescale = {"do_rescale": False} if factor is None else {"rescale_factor": factor}
    assert pixel_dtype(MAEImageProcessor(**rescale)) == dtype


@pytest.mark.parametrize(
    ("factor", "dtype"), [(0.00392, "uint8"), (1 / 127.5, "uint8"), (1.0, "float32"), (1e-4, "float32")]
)
def test_other_factors_belong_to_8_bits_or_leave_the_values_alone(factor, dtype):
    assert pixel_dtype(MAEImageProcessor(rescale_factor=factor)) == dtype


def test_a_missing_pixel_becomes_the_mean_and_a_patch_of_them_is_found():
    processor = MAEImageProcessor(image_mean=[2.0], image_std=[4.0], num_channels=1, do_rescale=False)
    images = torch.tensor([[[[6.0, math.nan, math.nan, math.nan], [math.nan, -2.0, math.nan, math.nan]]]])
    assert make_normalizer(processor)(images).tolist() == [[[[1, 0, 0, 0], [0, -1, 0, 0]]]]
    assert find_no_data(images, (2, 2)).tolist() == [[False, True]]
    assert find_no_data(images.nan_to_num().to(torch.uint8), (2, 2)) is None
