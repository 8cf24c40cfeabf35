"""Missing pixels, NaN or a value: resized, normalised by both image processors as by the commands, and drawn."""

import json
import math

import numpy as np
import pytest
import torch
from bad_images import encoded
from memory_source import MemorySource
from PIL import Image
from tiny import save_model
from transformers import AutoImageProcessor

from hf_mae import MAEConfig, MAEForPreTraining, MAEImageProcessor, MAEImageProcessorPil
from hf_mae.data.augment import sample_rng, training_view
from hf_mae.data.decode import BadImage, decode_image
from hf_mae.data.loader import EvaluationSet, TrainingStream
from hf_mae.data.order import Rows, StreamPlan
from hf_mae.data.stats import channel_stats
from hf_mae.data.transform import evaluation_spec, find_no_data, make_normalizer, rescale_settings
from hf_mae.image_processing_base_mae import mark_missing, resize_bands
from hf_mae.masking_mae import patchify
from hf_mae.visualize.command import Reconstructor

BACKENDS = [MAEImageProcessor, MAEImageProcessorPil]
both_backends = pytest.mark.parametrize("backend", BACKENDS, ids=["torchvision", "pil"])
every_dtype = pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
NAN = math.nan
BOX, BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC
NODATA = {"uint8": 0, "uint16": 65_535, "float32": -9999}
SCALE = {"uint8": 255, "uint16": 65_535, "float32": 1}


def scene(dtype: str, missing: bool = True) -> np.ndarray:
    """(2, 40, 50) smooth bands in the middle of the dtype's range; a corner, a line and a pixel are missing."""
    band, rows, columns = np.meshgrid(range(2), range(40), range(50), indexing="ij")
    waves = 0.5 + 0.3 * np.sin(rows / 6 + band) * np.cos(columns / 7)
    image = (waves * SCALE[dtype]).astype(dtype)
    if missing:
        image[:, :16, :20] = image[0, 30] = image[1, 25, 33] = NODATA[dtype]
    return image


def settings(dtype: str, nodata: float | None) -> dict:
    """An image processor's, for a model of 24 pixels."""
    return {
        "num_channels": 2, "size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}, "nodata": nodata,
        "image_mean": [0.5, 0.4], "image_std": [0.25, 0.5], **rescale_settings(dtype),
    }  # fmt: skip


def spec_of(processor):
    return evaluation_spec(MAEConfig(image_size=24, patch_size=8, num_channels=processor.num_channels), processor)


def command_pixels(processor, *images) -> torch.Tensor:
    """The pixel_values that every command computes of these images."""
    (batch,) = EvaluationSet(Rows(MemorySource([list(images)])), spec_of(processor), len(images))
    return make_normalizer(processor)(batch.images)


# ------------------------------------------------------------------------------------------ resizing


def test_a_resized_pixel_is_the_mean_of_those_that_are_there_or_missing():
    line = np.array([[[10], [20], [NAN], [40], [NAN], [NAN], [6], [2]]], np.float32)
    assert resize_bands(line, (1, 4), BOX)[0, :, 0] == pytest.approx([15, 40, NAN, 4], nan_ok=True)
    square = np.array([[[NAN], [NAN]], [[NAN], [8]]], np.float32)
    assert np.isnan(resize_bands(square, (1, 1), BOX)).all()  # a quarter
    square[0, 1] = 4
    assert resize_bands(square, (1, 1), BOX) == 6  # half


@pytest.mark.parametrize("size", [(16, 20), (20, 25), (33, 41), (80, 100)])
def test_missing_pixels_neither_spread_nor_change_their_neighbours(size):
    image = np.full((40, 50, 2), 7, np.float32)
    image[:20, :, 0] = NAN
    resized = resize_bands(image, size, BICUBIC)
    rows = np.arange(size[0]) + 0.5  # the middle of each
    expected = np.broadcast_to((rows < size[0] / 2)[:, None], size)
    assert np.array_equal(np.isnan(resized[:, :, 0]), expected)
    assert not np.isnan(resized[:, :, 1]).any()
    assert resized[~np.isnan(resized)] == pytest.approx(7, abs=1e-5)


def test_beside_missing_pixels_the_range_of_the_image_is_kept():
    image = np.zeros((16, 16, 1), np.float32)
    image[:, 8:] = 100
    assert resize_bands(image, (40, 40), BICUBIC).max() > 105  # the filter overshoots
    image[:3, :3] = NAN
    resized = resize_bands(image, (40, 40), BICUBIC)
    assert (np.nanmin(resized), np.nanmax(resized)) == (0, 100)


def test_random_crops_of_images_with_missing_pixels_hold_no_other_values():
    image = np.full((30, 40, 1), 5, np.float32)
    image[:, 10:] = NAN
    missing = []
    for number in range(40):
        view = training_view(image, sample_rng(0, 0, 0, number), (16, 16))
        assert view[~np.isnan(view)] == pytest.approx(5, abs=1e-5)
        missing.append(np.isnan(view).mean())
    assert max(missing) == 1  # a crop may have no data at all
    assert min(missing) < 0.8


# ------------------------------------------------------------------------------------------ a value


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
def test_a_value_becomes_nan_in_each_band_alone_and_other_images_stay(kind, dtype):
    image = kind(np.array([[0, 1], [2, 0]], dtype))
    marked = mark_missing(image, 0)
    assert str(marked.dtype).endswith("float32")
    assert marked.flatten().tolist() == pytest.approx([NAN, 1, 2, NAN], nan_ok=True)
    assert image.flatten().tolist() == [0, 1, 2, 0]
    assert mark_missing(image, -9999) is image
    assert mark_missing(image, None) is image


def test_decoding_gives_nan_or_the_image_as_it_was():
    gray = Image.fromarray(np.array([[0, 255], [7, 9]], np.uint8))
    assert decode_image(encoded(gray), 1, nodata=254).tobytes() == gray.tobytes()
    found = decode_image(encoded(gray), 3, nodata=255)
    assert found.shape == (2, 2, 3)
    assert found.reshape(4, 3).T.flatten() == pytest.approx([0, NAN, 7, 9] * 3, nan_ok=True)
    deep = np.array([[[0, 65_535]]], np.uint16)
    assert decode_image(deep, 2, "uint16", nodata=65_535).flatten() == pytest.approx([0, NAN], nan_ok=True)
    lowest = np.array([[-3.4028234663852886e38, 1.5]])
    assert np.isnan(decode_image(lowest, 1, "float32", nodata=-3.4028234663852886e38)).sum() == 1
    with pytest.raises(BadImage, match="every pixel has the nodata value 7") as caught:
        decode_image(np.full((3, 3), 7, np.uint8), 1, nodata=7)
    assert caught.value.reason == "NoData"


def test_a_jpeg_is_not_reduced_where_that_would_blend_missing_pixels():
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 200
    data = encoded(Image.fromarray(half), "JPEG", quality=100, subsampling=0)
    assert np.shape(decode_image(data, 1, min_pixels=64))[:2] == (8, 8)
    assert np.isnan(decode_image(data, 1, min_pixels=64, nodata=0)).sum() == 64 * 32


@pytest.mark.parametrize(("dtype", "nodata"), [("uint8", 255), ("uint16", 0), ("float32", -9999)])
def test_statistics_are_those_of_the_pixels_that_are_there(dtype, nodata):
    rng = np.random.default_rng(0)
    images = [rng.integers(1, 255, (6, 5, 2)).astype(dtype) for _ in range(3)]
    for image in images:
        image[:2, :, 1] = nodata
    stats = channel_stats(Rows(MemorySource([images])), 2, dtype, nodata=nodata)
    pixels = np.stack(images) / SCALE[dtype]
    kept = pixels[..., 0], pixels[:, 2:, :, 1]
    assert stats["image_mean"] == pytest.approx([part.mean(dtype=np.float64) for part in kept], rel=1e-6)
    assert stats["image_std"] == pytest.approx([part.std(dtype=np.float64) for part in kept], rel=1e-6)


def test_a_patch_without_data_is_left_out_of_the_loss_and_others_count_whole():
    image = np.random.default_rng(0).integers(1, 256, (2, 24, 24), dtype=np.uint8)
    image[:, :8, :8] = 0  # the first of nine patches
    image[:, 8:12, 8:16] = 0  # half of the fifth
    processor = MAEImageProcessor(**{**settings("uint8", 0), "size": {"shortest_edge": 24}})
    (batch,) = EvaluationSet(Rows(MemorySource([[image]])), spec_of(processor), 1)
    assert batch.images.dtype == torch.float32
    no_data = find_no_data(batch.images, (8, 8))
    assert no_data.tolist() == [[True] + [False] * 8]
    pixel_values = make_normalizer(processor)(batch.images)
    assert pixel_values[0, :, 8:12, 8:16].eq(0).all()
    config = MAEConfig(
        image_size=24, patch_size=8, num_channels=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )  # fmt: skip
    mask = torch.tensor([[1.0, 1, 0, 0, 1, 0, 0, 0, 1]])
    with torch.no_grad():
        output = MAEForPreTraining(config).eval()(pixel_values, mask=mask, no_data=no_data)
    errors = (output.logits - patchify(pixel_values, (8, 8))).square().mean(dim=-1)
    assert output.loss.item() == pytest.approx(errors[0, [1, 4, 8]].mean().item(), rel=1e-5)


# ------------------------------------------------------------------------------------------ image processors


@both_backends
@every_dtype
def test_a_processor_gives_0_the_mean_where_a_value_is_missing(backend, dtype):
    image = np.array([[[0.25, 0.5], [1, 0]], [[0, 0], [0.75, 1]]]) * SCALE[dtype]
    image = image.astype(dtype)
    image[0, 1, 1] = image[1, 0, 0] = NODATA[dtype]
    processor = backend(**settings(dtype, NODATA[dtype]), do_resize=False, do_center_crop=False)
    expected = (image / SCALE[dtype] - np.reshape([0.5, 0.4], (2, 1, 1))) / np.reshape([0.25, 0.5], (2, 1, 1))
    expected[image == NODATA[dtype]] = 0
    for one in (image, torch.from_numpy(image)):
        found = processor(one, return_tensors="pt")["pixel_values"]
        assert found.dtype == torch.float32
        assert np.allclose(found[0], expected, atol=1e-5)


@both_backends
def test_nan_is_missing_for_every_processor_and_the_callers_array_stays(backend):
    image = np.array([[[1, NAN], [3, 4]]], np.float32)
    options = {"num_channels": 1, "do_resize": False, "do_center_crop": False, "do_rescale": False}
    found = backend(**options, image_mean=2.0, image_std=2.0)(image, return_tensors="pt")["pixel_values"]
    assert found.flatten().tolist() == [-0.5, 0, 0.5, 1]
    found = backend(**options, do_normalize=False)(image, return_tensors="np")["pixel_values"]
    assert found.flatten().tolist() == [1, 0, 3, 4]
    assert np.isnan(image).sum() == 1


@every_dtype
def test_the_processors_give_the_pixels_of_the_commands(dtype):
    nodata, image = NODATA[dtype], scene(dtype)
    torchvision, pil = (backend(**settings(dtype, nodata)) for backend in BACKENDS)
    expected = command_pixels(torchvision, image)
    assert 0.1 < expected.eq(0).float().mean() < 0.3  # the corner and the line
    assert torch.allclose(pil(image, return_tensors="pt")["pixel_values"], expected, atol=1e-5)
    assert torch.allclose(torchvision(image, return_tensors="pt")["pixel_values"], expected, atol=1e-4)
    both = torchvision([image, scene(dtype, missing=False)], return_tensors="pt", disable_grouping=False)
    assert torch.allclose(both["pixel_values"][:1], expected, atol=1e-4)


@every_dtype
def test_pixels_away_from_missing_ones_are_those_of_the_whole_image(dtype):
    part, whole = (
        command_pixels(MAEImageProcessor(**settings(dtype, NODATA[dtype])), scene(dtype, missing))
        for missing in (True, False)
    )
    step = 2 / 255 / 0.25 if dtype == "uint8" else 1e-4  # whole images of 8 bits are rounded
    assert torch.allclose(part[:, 0, 12:17], whole[:, 0, 12:17], atol=step)
    assert torch.allclose(part[:, 1, 19:], whole[:, 1, 19:], atol=step)


@every_dtype
def test_without_missing_pixels_a_value_changes_no_bit(dtype):
    images = [scene(dtype, missing=False), np.ascontiguousarray(scene(dtype, missing=False)[:, ::-1])]
    plain, marked = (settings(dtype, nodata) for nodata in (None, NODATA[dtype]))
    assert torch.equal(*(command_pixels(MAEImageProcessor(**one), *images) for one in (plain, marked)))
    for backend in BACKENDS:
        assert torch.equal(*(backend(**one)(images, return_tensors="pt")["pixel_values"] for one in (plain, marked)))
    crops = []
    for one in (plain, marked):
        processor, rows = MAEImageProcessor(**one), Rows(MemorySource([images]))
        stream = TrainingStream(rows, StreamPlan(2, 1, 1), spec_of(processor), 0, [0], 0, 3)
        crops.append(torch.cat([make_normalizer(processor)(batch.images) for batch in stream]))
    assert torch.equal(*crops)


@both_backends
def test_the_value_is_saved_and_files_without_it_have_none(backend, tmp_path):
    backend(**settings("uint16", 65_535.0)).save_pretrained(tmp_path)
    name = "pil" if backend is MAEImageProcessorPil else "torchvision"
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=name)
    assert (type(loaded), loaded.nodata) == (backend, 65_535)
    image = scene("uint16")
    assert torch.allclose(loaded(image, return_tensors="pt")["pixel_values"], command_pixels(loaded, image), atol=1e-4)
    file = tmp_path / "preprocessor_config.json"
    stored = json.loads(file.read_text())
    assert stored.pop("nodata") == 65_535
    file.write_text(json.dumps(stored))
    assert AutoImageProcessor.from_pretrained(tmp_path, backend=name).nodata is None
    backend(**settings("uint16", None)).save_pretrained(tmp_path)
    assert "nodata" not in json.loads(file.read_text())


# ------------------------------------------------------------------------------------------ pictures


def test_missing_pixels_are_drawn_as_the_mean(tmp_path):
    folder = save_model(tmp_path / "model", size=(16, 16))
    processor = MAEImageProcessor.from_pretrained(folder, nodata=0)
    processor.save_pretrained(folder)
    gray = np.full((16, 16), 200, np.uint8)
    gray[:8] = 0
    pixel_values = Reconstructor(folder).pixel_values([encoded(Image.fromarray(gray))])
    assert pixel_values[0, 0, :8].eq(0).all()
    assert pixel_values[0, 0, 8:].numpy() == pytest.approx((200 / 255 - 0.3) / 0.4, abs=1e-5)
