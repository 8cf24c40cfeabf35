"""Image sizes and mask ratios that change in the course of a run."""

import pytest
import torch
import yaml
from runs import arguments, evaluations, load_pretrain_recipe, losses, run, start, weights_difference, weights_hash

from hf_mae import MAEConfig, MAEForPreTraining
from hf_mae.errors import UserError
from hf_mae.layers_mae import sincos_table
from hf_mae.training.pretrain import PretrainRun

# 12 steps: 1 to 3 at 4 pixels, 4 to 8 at 6 x 8, 9 to 12 at 8.
GROWING = {"image_size_schedule": ["0:4", "0.25:6x8", "0.6:8"], "mask_ratio_schedule": ["0:0.25", "0.5:0.75"]}
OPTIONS = {**GROWING, "save_steps": 1, "eval_steps": 6, "keep_checkpoints": 12}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "growing", **OPTIONS)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_step_has_the_size_the_noise_and_the_mask_ratio_of_its_part(tmp_path, monkeypatch, workers):
    words = arguments(tmp_path, **GROWING, num_workers=workers, per_device_batch_size=16)[1:]
    a_run = PretrainRun(load_pretrain_recipe(words))
    seen = []
    forward = a_run.model.forward

    def watching(pixel_values, **given):
        output = forward(pixel_values, **given)
        seen.append((*pixel_values.shape[2:], int(output.mask.sum(dim=1).unique().item())))
        return output

    monkeypatch.setattr(a_run.model, "forward", watching)
    a_run.train()
    training = [one for one in seen if one != (8, 8, 8)]  # evaluations remove half of 16
    # Two micro-batches a step, of 4, 12 and 16 patches; a quarter of them is removed, from step 7 on three quarters.
    assert training == [(4, 4, 1)] * 6 + [(6, 8, 3)] * 6 + [(6, 8, 9)] * 4 + [(8, 8, 12)] * 8


def test_the_tables_are_those_of_each_grid():
    model = MAEForPreTraining(MAEConfig(**TINY_AT_8)).train()
    small = MAEForPreTraining(MAEConfig(**{**TINY_AT_8, "image_size": (4, 6)})).train()
    for table, own in ((model.mae.embeddings.position_embeddings, 32), (model.decoder.decoder_pos_embed, 16)):
        assert torch.equal(table((2, 3)), sincos_table((2, 3), own))
    weights = {key: value for key, value in model.state_dict().items() if not key.endswith("table")}
    small.load_state_dict(weights, strict=False)
    images, noise = torch.randn(2, 3, 4, 6), torch.rand(2, 6)
    moved = model(images, noise=noise, interpolate_pos_encoding=True)
    assert torch.equal(moved.loss, small(images, noise=noise).loss)


TINY_AT_8 = {
    "image_size": 8, "patch_size": 2, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, "mask_ratio": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("step", [2, 3, 4, 8])
def test_a_run_cut_off_before_at_and_after_a_change_goes_on_exactly(whole, tmp_path, step):
    again = run(tmp_path / "run", resume=whole / f"checkpoint-{step}", **OPTIONS)
    assert weights_hash(again) == weights_hash(whole)
    assert losses(again) == {at: loss for at, loss in losses(whole).items() if at > step}
    assert evaluations(again) == {at: loss for at, loss in evaluations(whole).items() if at > step}


def test_it_goes_on_with_other_workers_and_micro_batches(whole, tmp_path):
    again = run(tmp_path / "run", resume=whole / "checkpoint-2", num_workers=2, per_device_batch_size=8, **OPTIONS)
    assert weights_difference(again, whole) < 1e-6


def test_checkpoints_and_model_have_the_last_size_and_the_schedule_matters(whole, tmp_path):
    for folder in (whole, whole / "checkpoint-2"):
        model = MAEForPreTraining.from_pretrained(folder)
        assert (model.config.image_size, model.config.mask_ratio) == (8, 0.5)
        assert torch.equal(model.mae.embeddings.position_embeddings.table, sincos_table((4, 4), 32))
    usual = run(tmp_path / "usual", **{**OPTIONS, **dict.fromkeys(GROWING)})
    assert evaluations(usual)[0] == evaluations(whole)[0], "evaluated at the same size with the same masks"
    assert weights_difference(usual, whole) > 1e-3


@pytest.mark.slow
def test_a_compiled_run_follows_the_schedule_too(whole, tmp_path, monkeypatch):
    compiled = MAEForPreTraining.compile
    monkeypatch.setattr(MAEForPreTraining, "compile", lambda model: compiled(model, backend="eager"))
    again = run(tmp_path / "run", compile=True, position_resize="sincos", **OPTIONS)
    assert losses(again) == pytest.approx(losses(whole), rel=1e-4)


def test_a_schedule_may_be_a_table_in_a_recipe_file_and_comes_back_from_run_config(tmp_path, whole):
    path = tmp_path / "mine.yaml"
    path.write_text("image_size_schedule: {0: 32, 0.5: 208x320}\nmask_ratio_schedule: {0: 0.5, 0.25: 0.75}\n")
    recipe = load_pretrain_recipe(["--recipe", str(path)])
    assert recipe.image_sizes == [(0.0, 32), (0.5, [208, 320])]
    assert recipe.mask_ratios == [(0.0, 0.5), (0.25, 0.75)]
    resolved = yaml.safe_load((whole / "run_config.yaml").read_text())["recipe"]
    path.write_text(yaml.safe_dump(resolved))
    assert load_pretrain_recipe(["--recipe", str(path)]).to_dict() == {**resolved, "recipe": str(path)}


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (["0:4", "0.5:6"], "image_size_schedule ends with 6, but image_size is 8; make them equal"),
        (["0:5", "0.5:8"], "image_size 5, from fraction 0 of the run on: .* the nearest that fits is 4x4"),
        (["0.1:4", "0.5:8"], "image_size_schedule 0.1:4 0.5:8 must start at 0, rise and stay below 1"),
        (["0:4", "0.5:6", "0.5:8"], "must start at 0, rise and"),
        (["0:4", "1:8"], "must start at 0, rise and"),
        (["0:4", "8"], "0:4 8 is not FRACTION:VALUE"),
        (["0:four"], "0:four is not FRACTION:VALUE"),
        (["0:2", "0.5:8"], "mask_ratio 0.5 keeps none of the 1 patches"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(tmp_path, capfd, schedule, message):
    assert_one_line(tmp_path, capfd, message, image_size_schedule=schedule)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (["0:1.5"], r"mask_ratio 1.5 lies outside \[0, 1\)"),
        (["0:0.5", "0.2:0.99"], "mask_ratio 0.99 keeps none of the 16 patches"),
        (["0:much"], "mask_ratio_schedule 0:much is not FRACTION:VALUE"),
    ],
)
def test_mask_ratios_that_do_not_fit_are_one_line(tmp_path, capfd, schedule, message):
    assert_one_line(tmp_path, capfd, message, mask_ratio_schedule=schedule)


def assert_one_line(tmp_path, capfd, message, **given):
    assert start(*arguments(tmp_path / "run", **given)) == 2
    (error,) = capfd.readouterr().err.strip().splitlines()
    with pytest.raises(UserError, match=message):
        raise UserError(error)


def test_a_run_is_not_gone_on_with_another_schedule(whole, tmp_path, capfd):
    changed = {**OPTIONS, "image_size_schedule": ["0:4", "0.5:8"]}
    assert start(*arguments(tmp_path / "run", resume=whole / "checkpoint-2", **changed)) == 2
    assert "with image_size_schedule ['0:4', '0.25:6x8', '0.6:8'], not ['0:4', '0.5:8']" in capfd.readouterr().err
