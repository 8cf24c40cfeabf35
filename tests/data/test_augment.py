import math

import numpy as np
import pytest
import torch
from memory_source import random_image
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from hf_mae.data.augment import random_resized_crop_box, sample_rng, training_view
from hf_mae.data.transform import evaluation_view, pixels_needed


def boxes(count: int, height: int, width: int, size: tuple[int, int], **options) -> np.ndarray:
    """(count, 4) of left, upper, width, height."""
    rng = np.random.default_rng(0)
    drawn = np.array([random_resized_crop_box(rng, height, width, size, **options) for _ in range(count)])
    return np.concatenate([drawn[:, :2], drawn[:, 2:] - drawn[:, :2]], axis=1)


# ------------------------------------------------------------------------------------------ the crop's box


@pytest.mark.parametrize(("height", "width"), [(300, 400), (37, 23), (224, 224), (5, 7), (2, 1), (1, 1)])
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (48, 16)])
def test_crop_boxes_lie_inside_the_image(height, width, size):
    left, top, w, h = boxes(300, height, width, size).T
    assert (w >= 1).all()
    assert (h >= 1).all()
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + w <= width).all()
    assert (top + h <= height).all()


@pytest.mark.parametrize("size", [(224, 224), (208, 320), (320, 208)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 0.5), (0.3, 0.3)])
def test_area_and_shape_of_a_crop_lie_within_scale_and_ratio_of_the_output(size, scale):
    # 2000 x 2000 pixels: rounding moves a side by half a pixel of 500 or more, so the bounds hold within 0.3 %.
    _, _, w, h = boxes(500, 2000, 2000, size, scale=scale).T
    area, shape = w * h / 2000**2, w / h / (size[1] / size[0])
    assert (area >= scale[0] * 0.997).all()
    assert (area <= scale[1] * 1.003).all()
    assert (shape >= 3 / 4 * 0.997).all()
    assert (shape <= 4 / 3 * 1.003).all()
    # All of the range is used: a rule that never left its middle would pass the bounds.
    assert shape.min() < 0.8
    assert shape.max() > 1.25
    # Crops that don't fit are drawn anew, so the largest are rarer the less the output's shape is the image's.
    assert area.min() <= scale[0] * 1.05
    assert area.max() >= scale[1] * (0.9 if size == (224, 224) or scale[1] < 1 else 0.7)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (500, 375), (64, 64)])
def test_square_crops_are_distributed_as_torchvisions(height, width):
    drawn = boxes(2000, height, width, (224, 224)).astype(float)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)])
    theirs = theirs[:, [1, 0, 3, 2]].astype(float)  # (top, left, height, width) -> ours

    def figures(box):
        left, top, w, h = box.T
        room_x, room_y = np.maximum(width - w, 1), np.maximum(height - h, 1)
        return np.stack([w * h / (height * width), np.log(w / h), left / room_x, top / room_y])

    ours, theirs = figures(drawn), figures(theirs)
    # Means of 2000 draws each have a standard error of std * sqrt(2 / 2000) apart; 5 of them would be a difference.
    tolerance = 5 * theirs.std(axis=1) * math.sqrt(2 / 2000)
    assert (np.abs(ours.mean(axis=1) - theirs.mean(axis=1)) < tolerance).all()
    assert ours.std(axis=1) == pytest.approx(theirs.std(axis=1), rel=0.08)


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        # wide: full height, 4/3 as wide; 30 * 4/3 = 40, in the middle of 3000
        (30, 3000, (32, 32), (1480, 0, 1520, 30)),
        # tall: full width, 40 / (3/4) = 53.3 high
        (4000, 40, (32, 32), (0, 1973, 40, 2026)),
        # an output twice as wide as high: 30 * 2 * 4/3 = 80
        (30, 3000, (16, 32), (1460, 0, 1540, 30)),
    ],
)
def test_of_very_long_images_the_largest_central_crop_of_an_allowed_shape_is_taken(height, width, size, expected):
    # Half the area of a 100:1 image never fits a shape of 3/4 to 4/3, so that every draw ends here.
    for number in range(20):
        rng = np.random.default_rng(number)
        assert random_resized_crop_box(rng, height, width, size, scale=(0.5, 1.0)) == expected
    if size == (32, 32):
        wide = torch.empty(3, height, width)
        top, left, h, w = RandomResizedCrop.get_params(wide, [0.5, 1.0], [3 / 4, 4 / 3])
        assert (left, top, left + w, top + h) == expected


# ------------------------------------------------------------------------------------------ the training view


def test_the_same_sample_gets_the_same_view_and_every_part_of_its_key_changes_it():
    image = Image.fromarray(random_image(40, 50))
    views = [training_view(image, sample_rng(3, 7, 2, 11), (16, 16)) for _ in range(2)]
    assert np.array_equal(*views)
    for other in ((4, 7, 2, 11), (3, 8, 2, 11), (3, 7, 3, 11), (3, 7, 2, 12), (7, 3, 2, 11)):
        assert not np.array_equal(views[0], training_view(image, sample_rng(*other), (16, 16)))


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_a_view_is_the_box_cut_out_and_resized_and_half_of_them_are_mirrored(size):
    # Filters of values so far from both ends do not overshoot them.
    image, flipped = Image.fromarray(random_image(40, 50) // 2 + 64), 0
    for row in range(40):
        box = random_resized_crop_box(sample_rng(0, 0, 0, row), 40, 50, size)
        expected = np.asarray(image.crop(box).resize(size[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        plain = training_view(image, sample_rng(0, 0, 0, row), size, flip=False)
        assert plain.shape == (3, *size)
        assert np.abs(plain.astype(int) - expected).max() <= 1
        view = training_view(image, sample_rng(0, 0, 0, row), size)
        assert np.array_equal(view, plain) != np.array_equal(view, plain[:, :, ::-1])
        flipped += np.array_equal(view, plain[:, :, ::-1])
        assert view.flags.c_contiguous
    assert 10 <= flipped <= 30  # binomial(40, 1/2): outside with probability 0.1 %


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.uint8), (13, np.uint16), (2, np.uint8)])
def test_a_view_keeps_channels_and_dtype(channels, dtype):
    array = random_image(20, 30, channels, dtype)
    is_picture = dtype == np.uint8 and channels in (1, 3)
    image = Image.fromarray(array.squeeze(-1) if channels == 1 else array) if is_picture else array
    view = training_view(image, sample_rng(0, 0, 0, 0), (16, 24))
    assert view.shape == (channels, 16, 24)
    assert view.dtype == dtype
    # At its own size an image stays what it is.
    assert np.array_equal(evaluation_view(image, (20, 30), (20, 30)), array.transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_a_view_of_any_type_and_channel_count_is_that_of_the_same_values_in_another(channels):
    array = random_image(40, 50, channels) // 2 + 64
    for row in range(10):
        plain = training_view(array, sample_rng(0, 0, 0, row), (16, 24)).astype(int)
        for dtype in (np.uint16, np.float32):
            other = training_view(array.astype(dtype), sample_rng(0, 0, 0, row), (16, 24))
            assert np.abs(plain - other).max() <= 1.5  # each of the two passes rounds to 8 bits


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@pytest.mark.parametrize("shape", [1, 0.6, 2])
def test_of_an_image_with_the_pixels_needed_no_crop_is_smaller_than_the_output(size, shape):
    height = math.sqrt(pixels_needed(size, (0.2, 1.0)) / shape)
    drawn = boxes(2000, math.ceil(height), math.ceil(height * shape), size)
    assert (drawn[:, 2:].min(axis=0) >= np.array(size[::-1]) - 1).all()  # sides are rounded
    if shape == 1:
        assert (drawn[:, 2:].min(axis=0) <= 1.1 * np.array(size[::-1])).all()  # and the smallest are hardly larger


# ------------------------------------------------------------------------------------------ one draw


@pytest.mark.parametrize(("height", "width"), [(30, 200), (200, 30), (64, 64), (7, 5)])
def test_one_draw_is_cut_to_the_image_where_torchvision_draws_again(height, width):
    cut, again = 0, 0
    for seed in range(300):
        left, top, right, bottom = random_resized_crop_box(
            np.random.default_rng(seed), height, width, (32, 32), (0.08, 1.0), one_draw=True
        )
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        # The same numbers, by hand: an area, a shape, then a place.
        rng = np.random.default_rng(seed)
        area = height * width * rng.uniform(0.08, 1.0)
        shape = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = min(round(math.sqrt(area * shape)), width), min(round(math.sqrt(area / shape)), height)
        assert (right - left, bottom - top) == (w, h)
        assert (top, left) == (rng.integers(0, height - h + 1), rng.integers(0, width - w + 1))
        cut += area > w * h * 1.2
        usual = random_resized_crop_box(np.random.default_rng(seed), height, width, (32, 32), (0.08, 1.0))
        again += usual != (left, top, right, bottom)
    long = max(height, width) > 2 * min(height, width)
    assert (cut > 100) == long
    assert again > cut / 2


def test_one_draw_of_an_image_of_one_pixel_is_that_pixel():
    rng = np.random.default_rng(0)
    assert random_resized_crop_box(rng, 1, 1, (8, 8), (0.08, 0.1), one_draw=True) == (0, 0, 1, 1)
