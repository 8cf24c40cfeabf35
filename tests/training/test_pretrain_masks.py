"""Several masks of each decoded image in one step."""

import pytest
import torch
import yaml
from runs import (
    arguments,
    checkpoints,
    events,
    load_pretrain_recipe,
    losses,
    run,
    start,
    weights_difference,
    weights_hash,
)

from hf_mae.training.pretrain import PretrainRun

TWICE = {"masks_per_image": 2, "save_steps": 3, "eval_steps": 12}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "twice", keep_checkpoints=9, **TWICE)


def test_the_loss_of_a_step_is_the_mean_over_the_masks_of_each_image(tmp_path):
    words = arguments(tmp_path, masks_per_image=4, total_batch_size=32, per_device_batch_size=16)[1:]
    step = PretrainRun(load_pretrain_recipe(words))
    first, second = (next(batches) for batches in [step.batches] for _ in range(2))
    assert len(first.images) == len(second.images) == 4
    assert first.noise.shape == (16, 16)
    assert len(torch.unique(torch.cat([first.noise, second.noise]), dim=0)) == 32
    expected = [
        step.model(step.normalize(batch.images), noise=batch.noise[number::4]).loss
        for batch in (first, second)
        for number in range(4)
    ]
    (told,) = [losses(run(tmp_path / "run", masks_per_image=4, total_steps=1, per_device_batch_size=16))[1]]
    assert told == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_images_are_counted_once_and_an_epoch_is_a_pass_over_them(whole):
    derived = yaml.safe_load((whole / "run_config.yaml").read_text())["derived"]
    last = [event for event in events(whole) if "loss" in event][-1]
    assert (last["step"], last["images_seen"]) == (12, 12 * 16)
    assert last["epoch"] == pytest.approx(12 * 16 / derived["training_images"])
    recipe = load_pretrain_recipe(["--masks_per_image", "4", "--total_batch_size", "64", "--epochs", "3"])
    assert recipe.steps(1600)[0] == 3 * 1600 * 4 // 64
    assert recipe.lr == pytest.approx(recipe.blr * 64 / 256)


def test_a_run_cut_off_goes_on_exactly_and_with_other_workers_and_micro_batches(whole, tmp_path):
    again = run(tmp_path / "workers", resume=whole / "checkpoint-6", num_workers=2, **TWICE)
    assert weights_hash(again) == weights_hash(whole)
    assert checkpoints(again) == [9, 12]
    again = run(tmp_path / "small", resume=whole / "checkpoint-6", per_device_batch_size=8, **TWICE)
    assert weights_difference(again, whole) < 1e-6
    usual = run(tmp_path / "usual", **{**TWICE, "masks_per_image": None, "total_batch_size": 16})
    assert losses(usual) != losses(whole)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"masks_per_image": 3}, "total_batch_size 32 is not a multiple of masks_per_image 3"),
        ({"masks_per_image": 0}, "masks_per_image 0 is out of range"),
        ({"masks_per_image": 4, "per_device_batch_size": 2}, "sizes that fit: 4, 8, 16, 32"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, capfd, given, message):
    assert start(*arguments(tmp_path / "run", **given)) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_a_run_with_one_number_of_masks_is_not_gone_on_with_another(whole, tmp_path, capfd):
    words = arguments(tmp_path / "run", resume=whole / "checkpoint-6", **{**TWICE, "masks_per_image": 4})
    assert start(*words) == 2
    assert "with masks_per_image 2, not 4" in capfd.readouterr().err
