"""Steps whose loss or gradient is not finite: left out by all processes, named, and stopped at when they go on."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import torchrun
from runs import arguments, checkpoints, evaluations, events, losses, run, start, weights_difference, weights_hash
from safetensors.torch import load_file
from torch import nn

from hf_mae.errors import UserError
from hf_mae.optim.groups import adamw
from hf_mae.training import guard as guard_module
from hf_mae.training.guard import StepGuard

# Float images: their values are finite, but the square of one is not.
OPTIONS = {
    "dataset": "tiles", "eval_dataset": "clean", "image_mean": 0.5, "image_std": 0.5, "num_workers": 1,
    "total_batch_size": 8, "total_steps": 16, "save_steps": 4, "eval_steps": 8, "norm_pix_loss": False,
}  # fmt: skip


def tiles(folder: Path, count: int, bad: range = range(0)) -> None:
    rng = np.random.default_rng(count)
    folder.mkdir()
    for number in range(count):
        tile = rng.random((8, 8), dtype=np.float32)
        np.save(folder / f"{number:03}.npy", tile * 1e30 if number in bad else tile)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiles(tmp_path / "clean", 12)
    return tmp_path


def skipped(output_dir) -> dict[int, list[str]]:
    return {event["step"]: event["samples"] for event in events(output_dir) if event.get("skipped")}


def is_finite(folder) -> bool:
    return all(value.isfinite().all() for value in load_file(Path(folder) / "model.safetensors").values())


def test_a_skipped_step_changes_neither_weights_nor_moments_nor_their_count():
    model = nn.Linear(3, 2)
    optimizer = adamw(model, (0.9, 0.95), 0.05)
    for group in optimizer.param_groups:
        group["lr"] = 0.1

    def step(skip: float) -> None:
        model(torch.ones(1, 3)).square().sum().backward()
        if skip:
            model.weight.grad[0, 0] = float("nan")
        optimizer.found_inf = torch.tensor(skip)
        optimizer.step()
        optimizer.zero_grad()

    step(0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {key: value.clone() for key, value in optimizer.state[model.weight].items()}
    step(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, moments[key]) for key, value in optimizer.state[model.weight].items())
    step(0.0)
    assert not torch.equal(model.weight, before["weight"])
    assert optimizer.state[model.weight]["step"] == 2


@pytest.mark.parametrize("micro_batch", [8, 4])
def test_steps_with_a_sample_of_huge_values_are_left_out_and_name_their_batch(folder, micro_batch, capfd):
    tiles(folder / "tiles", 40, bad=range(7, 8))
    run("out", per_device_batch_size=micro_batch, **OPTIONS)
    named = skipped("out")
    assert len(named) in (3, 4)  # 16 steps of 8 are 3.2 epochs
    assert all(len(samples) == 8 and "007.npy" in samples for samples in named.values())
    assert is_finite("out")
    assert all(event["loss"] is not None or event["step"] in named for event in events("out") if "loss" in event)
    assert all(losses("out")[step] is None for step in named)  # each step has a line of its own, here
    assert all(value < 10 for value in evaluations("out").values())
    trainer = json.loads(Path("out/checkpoint-16/trainer.json").read_text())
    assert trainer["guard"]["skipped_steps"] == len(named)
    assert "its loss or gradient is not finite" in capfd.readouterr().out


def test_the_mean_loss_of_a_line_is_that_of_the_steps_that_were_taken(folder):
    tiles(folder / "tiles", 40, bad=range(7, 8))
    run("each", **OPTIONS)
    run("fours", log_steps=4, **OPTIONS)
    each = losses("each")
    for step, loss in losses("fours").items():
        taken = [each[s] for s in range(step - 3, step + 1) if each[s] is not None]
        assert loss == pytest.approx(sum(taken) / len(taken))
    assert weights_hash("fours") == weights_hash("each")


def test_ten_steps_in_a_row_end_the_run_with_its_last_good_checkpoint(folder, capfd):
    tiles(folder / "tiles", 40, bad=range(0, 40))
    assert start(*arguments("out", **OPTIONS)) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("hf-mae: error: 10 steps in a row were skipped, because loss or gradient was not finite")
    assert list(skipped("out")) == list(range(1, 11))
    assert checkpoints("out") == [4, 8]
    assert is_finite("out/checkpoint-8")
    assert not Path("out/model.safetensors").exists()


def test_the_count_of_steps_in_a_row_goes_on_after_a_resume(folder, capfd):
    tiles(folder / "tiles", 40, bad=range(0, 40))
    assert start(*arguments("first", **OPTIONS)) == 2
    shutil.copytree("first/checkpoint-8", "out/checkpoint-8")
    assert start(*arguments("out", **OPTIONS, resume="auto")) == 2
    assert list(skipped("out")) == [9, 10]
    assert "10 steps in a row" in capfd.readouterr().err


def test_a_finite_step_ends_the_row():
    guard = StepGuard(SimpleNamespace(reduce=lambda word, _: word, device=torch.device("cpu")), skipped_in_a_row=8)
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(guard_module, "gather_object", lambda keys: keys)
        for step, finite in enumerate([False, True, *[False] * 9], 1):
            assert guard.judge(step, torch.tensor(finite), False, ["a", "b"]).item() == (not finite)
            (verdict,) = guard.verdicts(up_to_now=False)
            assert (verdict.step, verdict.skipped, verdict.samples) == (step, not finite, [] if finite else ["a", "b"])
            guard.check()
        assert (guard.skipped_steps, guard.skipped_in_a_row) == (10, 9)
        guard.judge(12, torch.tensor(False), True, [])
        assert guard.verdicts(up_to_now=False)[0].stop
        with pytest.raises(UserError, match="10 steps in a row"):
            guard.check()


@pytest.mark.slow
def test_a_bad_sample_on_one_of_two_processes_skips_the_step_on_both(folder):
    tiles(folder / "tiles", 1000, bad=range(0, 1000, 25))  # so many that both runs deal them out alike
    torchrun(folder / "two", **OPTIONS)
    run("one", **OPTIONS)
    # The same batches, in the same steps; on two processes the bad sample is in one half of them.
    assert {step: sorted(keys) for step, keys in skipped("two").items()} == {
        step: sorted(keys) for step, keys in skipped("one").items()
    }
    assert 2 <= len(skipped("two")) <= 10
    assert is_finite("two")
    assert weights_difference("two", "one") < 1e-5


@pytest.mark.slow
def test_ten_bad_steps_in_a_row_end_both_processes(folder):
    tiles(folder / "tiles", 40, bad=range(0, 40))
    with pytest.raises(AssertionError, match="10 steps in a row"):
        torchrun(folder / "two", **OPTIONS)
    assert checkpoints("two") == [4, 8]
    assert not Path("two/model.safetensors").exists()
