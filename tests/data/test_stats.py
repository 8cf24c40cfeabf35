import numpy as np
import pytest
from bad_images import encoded, tiff
from memory_source import MemorySource, memory_rows, noise_images
from PIL import Image

from hf_mae.data.order import Rows
from hf_mae.data.sources import open_source
from hf_mae.data.stats import channel_stats, probe_rows
from hf_mae.errors import DataError


def array_rows(*images: np.ndarray | bytes, block: int | None = None) -> Rows:
    return Rows(MemorySource([list(images)], block))


def test_two_images_by_hand():
    # Pixels 0, 0, 255 and 255, 255, 255, 0, 0 of one channel: mean 4/8, std sqrt(1/4)
    one = np.array([[0, 0, 255]], np.uint8)[..., None]
    other = np.array([[255, 255, 255, 0, 0]], np.uint8)[..., None]
    assert channel_stats(array_rows(one, other), 1, "uint8") == {
        "image_mean": pytest.approx([0.5], abs=1e-15),
        "image_std": pytest.approx([0.5], abs=1e-15),
        "rescale_factor": 1 / 255,
        "num_images": 2,
        "num_bad": 0,
    }
    # 0 and 65535, 13107 (a fifth): mean 0.4, squares (0 + 1 + 0.04) / 3, less 0.16
    deep = np.array([[0, 65535, 13107]], np.uint16)[..., None]
    stats = channel_stats(array_rows(deep), 1, "uint16")
    assert stats["image_mean"] == pytest.approx([0.4], abs=1e-15)
    assert stats["image_std"] == pytest.approx([(1.04 / 3 - 0.16) ** 0.5], abs=1e-15)
    assert stats["rescale_factor"] == 1 / 65535


@pytest.mark.parametrize(
    ("channels", "dtype", "factor"),
    [(1, "uint8", 1 / 255), (3, "uint8", 1 / 255), (13, "uint16", 1 / 65535), (2, "float32", 1.0)],
)
def test_figures_are_numpys_over_all_pixels_of_images_of_any_size(channels, dtype, factor):
    shards = [
        noise_images([count], (side, side + 3, channels), np.dtype(dtype))[0] for count, side in ((3, 7), (4, 12))
    ]
    rows = Rows(MemorySource(shards))
    pixels = np.concatenate([image.reshape(-1, channels) for shard in shards for image in shard]).astype(np.float64)
    stats = channel_stats(rows, channels, dtype)
    assert stats["image_mean"] == pytest.approx((pixels * factor).mean(axis=0), rel=1e-12)
    assert stats["image_std"] == pytest.approx((pixels * factor).std(axis=0), rel=1e-12)
    assert stats["num_images"] == 7


def test_small_differences_of_large_numbers_are_not_lost():
    rng = np.random.default_rng(0)
    images = [(1e4 + rng.integers(-2, 3, (20, 20, 1)) / 64).astype(np.float32) for _ in range(50)]
    stats = channel_stats(array_rows(*images), 1, "float32")
    assert stats["image_std"] == pytest.approx([np.concatenate(images).astype(np.float64).std()], rel=1e-9)
    assert 0.01 < stats["image_std"][0] < 0.03


def test_a_constant_channel_gets_deviation_1_and_a_faint_one_keeps_its_own():
    images = [np.full((6, 5, 4), 0.0, np.float32) for _ in range(3)]
    for number, image in enumerate(images):
        image[..., 1] = 0.1
        image[..., 2] = 1e9
        image[..., 3] = number * 1e-15  # some units are large
    stats = channel_stats(array_rows(*images), 4, "float32")
    assert stats["image_std"][:3] == [1.0, 1.0, 1.0]
    assert stats["image_std"][3] == pytest.approx(1e-15 * (2 / 3) ** 0.5)
    black = [np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)]
    assert channel_stats(array_rows(*black), 3, "uint8")["image_std"] == [1.0, 1.0, 1.0]


def test_some_images_stand_for_all_evenly_spaced_or_the_first():
    images = [np.full((2, 2, 1), number, np.uint8) for number in range(9)]
    every_fourth = channel_stats(array_rows(*images), 1, "uint8", max_samples=3)
    assert every_fourth["image_mean"] == pytest.approx([4 / 255])  # 0, 4, 8
    assert every_fourth["image_std"] == pytest.approx([(32 / 3) ** 0.5 / 255])
    first = channel_stats(array_rows(*images, block=4), 1, "uint8", max_samples=3)
    assert first["image_mean"] == pytest.approx([1 / 255])  # 0, 1, 2
    assert every_fourth["num_images"] == first["num_images"] == 3


def test_bad_images_are_left_out_and_counted():
    images = [np.full((2, 2, 1), 51, np.uint8), b"rubbish", np.full((2, 2, 1), 204, np.uint8), b""]
    stats = channel_stats(array_rows(*images), 1, "uint8")
    assert stats["image_mean"] == pytest.approx([0.5])
    assert (stats["num_images"], stats["num_bad"]) == (2, 2)
    nan = np.full((2, 2, 1), np.nan, np.float32)
    stats = channel_stats(array_rows(nan, np.array([[[1.0], [3.0]]], np.float32)), 1, "float32")
    assert (stats["image_mean"], stats["image_std"], stats["num_bad"]) == ([2.0], [1.0], 1)
    with pytest.raises(DataError, match=r"none of 2 images of memory can be decoded \(shard0#1: "):
        channel_stats(array_rows(b"rubbish", b""), 1, "uint8")


def test_the_digits_by_scikit_learn():
    from sklearn.datasets import load_digits

    pixels = np.round(load_digits().images * 255 / 16) / 255
    stats = channel_stats(Rows(open_source("digits")), 1, "uint8")
    assert stats["image_mean"] == pytest.approx([pixels.mean()])
    assert stats["image_std"] == pytest.approx([pixels.std()])
    assert stats["num_images"] == 1797


# ------------------------------------------------------------------------------------------ what kind of images

GRAY8, COLOUR8 = np.zeros((6, 5, 1), np.uint8), np.zeros((6, 5, 3), np.uint8)
GRAY16, BANDS16 = np.zeros((6, 5, 1), np.uint16), np.zeros((6, 5, 4), np.uint16)
BANDS8, FLOATS = np.zeros((6, 5, 4), np.uint8), np.zeros((6, 5, 4), np.float32)


def kind(images, num_channels=None):
    probe = probe_rows(array_rows(*images), num_channels)
    return probe.num_channels, probe.dtype


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([GRAY8, GRAY8], (1, "uint8")),
        ([GRAY8, COLOUR8, GRAY8], (3, "uint8")),
        ([GRAY16, GRAY8], (1, "uint16")),
        ([GRAY16, COLOUR8], (3, "uint16")),
        ([BANDS8, BANDS16], (4, "uint16")),
        ([BANDS8, FLOATS, BANDS16], (4, "float32")),
        ([b"rubbish", BANDS8, b""], (4, "uint8")),
    ],
)
def test_channels_and_pixel_type_of_a_data_set(images, expected):
    assert kind(images) == expected


def test_channel_counts_that_do_not_go_together_are_an_error_with_the_remedy():
    with pytest.raises(DataError, match=r"memory have 3 and 4 channels; .* pass --num_channels"):
        probe_rows(array_rows(COLOUR8, BANDS8))
    with pytest.raises(DataError, match="have 1 and 3 and 4 channels"):
        probe_rows(array_rows(COLOUR8, BANDS8, GRAY8))


def test_the_number_of_channels_asked_for_is_found_if_any_image_has_it():
    rgba = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)))
    near_infrared = tiff(BANDS8, photometric="rgb", planarconfig="contig", extrasamples=["unspecified"])
    for images in ([rgba, COLOUR8], [near_infrared], [COLOUR8, BANDS8]):
        assert kind(images, 4) == (4, "uint8")
        assert kind(images, 3) == (3, "uint8")
    assert kind([rgba]) == (3, "uint8")
    assert kind([near_infrared]) == (4, "uint8")
    assert kind([encoded(Image.new("RGB", (8, 8)))], 4) == (3, "uint8")
    with pytest.raises(DataError, match="have 3 and 4 channels"):
        probe_rows(array_rows(COLOUR8, BANDS8), 13)


def test_no_image_that_can_be_decoded_is_an_error_that_names_one():
    with pytest.raises(DataError, match=r"none of the first images of memory can be decoded \(shard0#1: "):
        probe_rows(array_rows(b"rubbish", b""))


def test_up_to_sixteen_images_are_looked_at_evenly_spaced_or_the_first():
    rows = memory_rows([50, 41])
    probe_rows(rows)
    looked_at = [int(rows.shard_starts[shard]) + row for shard, read in rows.source.reads for row in read]
    assert looked_at == [0, 6, 12, 18, 24, 30, 36, 42, 48, 54, 60, 66, 72, 78, 84, 90]
    rows = memory_rows([50, 41], block=10)
    probe_rows(rows, most=3)
    assert rows.source.reads == [(0, (0, 1, 2))]
