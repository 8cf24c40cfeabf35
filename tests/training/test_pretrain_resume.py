"""Runs of `hf-mae pretrain` that continue from a checkpoint: exactly."""

import shutil

import pytest
from runs import (
    arguments,
    checkpoints,
    cut_off,
    evaluations,
    events,
    losses,
    mistake,
    run,
    tree,
    weights_difference,
    weights_hash,
)

pytestmark = pytest.mark.usefixtures("own_caches", "no_process_is_left")


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_run_cut_off_after_a_checkpoint_ends_with_the_same_weights_and_numbers(stages, tmp_path, step):
    output_dir = cut_off(stages, step, tmp_path / "run")
    run(output_dir, save_steps=3, eval_steps=5, keep_checkpoints=9, resume="auto")
    assert weights_hash(output_dir) == weights_hash(stages)
    assert losses(output_dir) == losses(stages)
    assert evaluations(output_dir) == evaluations(stages)
    assert [event["step"] for event in events(output_dir)] == [event["step"] for event in events(stages)]
    assert checkpoints(output_dir) == [3, 6, 9, 12]


@pytest.mark.gpu
def test_a_deterministic_run_on_a_gpu_goes_on_bit_by_bit(tmp_path):
    options = {"deterministic": True, "mixed_precision": "bf16", "num_workers": 2, "save_steps": 3}
    whole = run(tmp_path / "whole", **options)
    shutil.copytree(whole / "checkpoint-9", tmp_path / "run" / "checkpoint-9")
    run(tmp_path / "run", resume="auto", **options)
    assert weights_hash(tmp_path / "run") == weights_hash(whole)


def test_a_run_goes_on_with_other_workers_and_micro_batches(stages, tmp_path):
    output_dir = cut_off(stages, 3, tmp_path / "run")
    shared = {"eval_steps": 5, "resume": "auto", "keep_checkpoints": 9}
    run(output_dir, save_steps=3, num_workers=2, **shared)
    assert weights_hash(output_dir) == weights_hash(stages)
    shutil.rmtree(output_dir / "checkpoint-12")
    shutil.rmtree(output_dir / "checkpoint-9")
    run(output_dir, save_steps=2, num_workers=1, per_device_batch_size=8, **shared)
    assert checkpoints(output_dir) == [3, 6, 8, 10, 12]
    assert losses(output_dir) == pytest.approx(losses(stages), rel=1e-6)
    assert evaluations(output_dir) == pytest.approx(evaluations(stages), rel=1e-6)
    assert weights_difference(output_dir, stages) < 1e-6


def test_a_named_checkpoint_is_gone_on_from_in_a_folder_of_its_own(stages, tmp_path):
    before = tree(stages)
    output_dir = run(tmp_path / "run", save_steps=6, eval_steps=5, resume=stages / "checkpoint-6")
    assert weights_hash(output_dir) == weights_hash(stages)
    assert losses(output_dir) == {step: loss for step, loss in losses(stages).items() if step > 6}
    assert tree(stages) == before


def test_a_broken_checkpoint_is_named_and_the_one_before_gone_on_from(stages, tmp_path, caplog):
    output_dir = cut_off(stages, 9, tmp_path / "run")
    broken = output_dir / "checkpoint-9" / "optimizer.safetensors"
    content = bytearray(broken.read_bytes())
    content[-5] ^= 1
    broken.write_bytes(content)
    run(output_dir, save_steps=3, eval_steps=5, keep_checkpoints=9, resume="auto")
    assert f"{broken} is not what was saved" in caplog.text
    assert weights_hash(output_dir) == weights_hash(stages)
    assert losses(output_dir) == losses(stages)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(stages, tmp_path):
    output_dir = cut_off(stages, 0, tmp_path / "run")
    assert checkpoints(output_dir) == []
    run(output_dir, save_steps=3, eval_steps=5, keep_checkpoints=9, resume="auto")
    assert weights_hash(output_dir) == weights_hash(stages)
    assert [event["step"] for event in events(output_dir)] == [event["step"] for event in events(stages)]


def test_a_run_that_is_over_stays_as_it_is_when_it_is_started_again(stages, tmp_path, capfd):
    output_dir = tmp_path / "run"
    shutil.copytree(stages, output_dir)
    run(output_dir, save_steps=3, eval_steps=5, keep_checkpoints=9, resume="auto")
    assert weights_hash(output_dir) == weights_hash(stages)
    assert events(output_dir) == events(stages)
    assert "after step 12" in capfd.readouterr().out


def test_a_resume_with_other_rows_held_out_is_refused(stages, capsys):
    message = mistake(capsys, *arguments(stages, resume="auto", eval_fraction=0.2))
    assert "belongs to a run with eval_fraction None, not 0.2; use the same recipe" in message
