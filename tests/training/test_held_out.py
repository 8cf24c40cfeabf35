"""The evaluation images of a run and their pictures."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from runs import arguments, load_pretrain_recipe, pictures, run
from transformers import AutoImageProcessor

from hf_mae import MAEImageProcessorPil
from hf_mae.data.loader import EvaluationSet
from hf_mae.training.pretrain import PretrainRun

pytestmark = pytest.mark.usefixtures("own_caches", "no_process_is_left")


def test_the_picture_opens_and_shows_four_columns_that_differ(finished):
    with Image.open(finished / "reconstructions" / "step-12.png") as picture:
        pixels = np.asarray(picture.convert("L"), dtype=np.float32)
    assert min(pixels.shape) > 128
    # Twelve digits in six rows of two, each in cells of 128 pixels with margins of 6, under a title of 22.
    original, masked, predicted, pasted = (pixels[22:150, 6 + 134 * n : 134 + 134 * n] for n in range(4))
    for cell in (original, masked, predicted, pasted):
        assert cell.std() > 10
    gray = (masked == 128) | (masked == 127)
    assert gray.mean() == pytest.approx(0.5, abs=0.01)  # half of the patches are removed
    assert np.array_equal(original[~gray], masked[~gray])
    assert np.array_equal(predicted[gray], pasted[gray])
    assert np.abs(original - pasted)[~gray].max() <= 1
    assert np.abs(original - pasted)[gray].mean() > 1


def test_every_evaluation_shows_the_same_images_behind_the_same_masks(finished):
    pictures = []
    for step in (0, 5, 10, 12):
        with Image.open(finished / "reconstructions" / f"step-{step}.png") as picture:
            pictures.append(np.asarray(picture))
    shown, predicted = np.s_[:, 6:268], np.s_[:, 274:536]
    assert all(np.array_equal(picture[shown], pictures[0][shown]) for picture in pictures)
    assert all(not np.array_equal(a[predicted], b[predicted]) for a, b in itertools.pairwise(pictures))


def test_evaluation_pixels_are_those_of_the_image_processor_to_the_last_digit(tmp_path):
    paths = pictures(tmp_path / "data", 30, size=(60, 45))
    pictures(tmp_path / "data" / "wide", 30, size=(40, 71))
    options = {"dataset": tmp_path / "data", "image_size": 16, "patch_size": 4, "eval_crop_pct": 0.875}
    output_dir = run(tmp_path / "run", total_steps=1, **options)
    recipe = load_pretrain_recipe(arguments(tmp_path / "other", eval_dataset=tmp_path / "data", **options)[1:])
    pretraining = PretrainRun(recipe)
    processor = AutoImageProcessor.from_pretrained(output_dir, backend="pil")
    assert type(processor) is MAEImageProcessorPil
    seen = 0
    held_out = pretraining.held_out
    for batch in EvaluationSet(held_out.rows, held_out.spec, held_out.batch_size):
        files = [Image.open(tmp_path / "data" / key) for key in batch.keys]
        expected = processor(files, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pretraining.normalize(batch.images), expected, atol=1e-6, rtol=0)
        seen += len(files)
    assert seen == len(paths) + 30
