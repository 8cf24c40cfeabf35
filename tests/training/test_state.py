"""A run's state goes into a checkpoint's two JSON files and comes back."""

import json

import pytest

from hf_mae.data.order import StreamPlan
from hf_mae.errors import CheckpointError
from hf_mae.training.state import RunState


def a_state(**changes) -> RunState:
    recipe = {"dataset": "digits", "seed": 3, "crop_scale": [0.2, 1.0]}
    plan = StreamPlan(total_batch_size=32, chunks=4, groups=2)
    return RunState(recipe, 12, plan, list(range(8)), {"kind": "digits", "rows": [9]}, **changes)


@pytest.mark.parametrize("scaler", [None, {"scale": 65536.0, "_growth_tracker": 2}])
def test_a_state_comes_back_from_its_files(tmp_path, scaler):
    bad = {"counts": {"EmptyFile": 1}, "named": [{"key": "a.png", "reason": "EmptyFile"}]}
    state = a_state(guard={"skipped_steps": 2, "skipped_in_a_row": 1}, bad=bad, scaler=scaler)
    state.advance(32)
    state.advance(32)
    state.write(tmp_path)
    assert RunState.read(tmp_path) == state
    assert (state.step, state.images_seen) == (2, 64)


def test_the_files_hold_these_keys(tmp_path):
    a_state().write(tmp_path)
    trainer, data = (json.loads((tmp_path / name).read_text()) for name in ("trainer.json", "data.json"))
    assert list(trainer) == ["step", "images_seen", "total_steps", "guard", "version", "recipe"]
    assert list(data) == ["plan", "seed", "positions", "fingerprint", "bad"]
    assert data["seed"] == 3


def test_a_folder_without_state_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(CheckpointError, match=r"trainer.json is missing; name a checkpoint-STEP folder of a run"):
        RunState.read(tmp_path)
    a_state().write(tmp_path)
    (tmp_path / "data.json").write_text("no")
    with pytest.raises(CheckpointError, match="is not JSON"):
        RunState.read(tmp_path)


@pytest.mark.parametrize("part", ["step", "images_seen", "recipe", "guard", "plan", "positions", "bad"])
def test_a_state_that_lacks_a_part_is_refused(tmp_path, part):
    a_state().write(tmp_path)
    for name in ("trainer.json", "data.json"):
        content = json.loads((tmp_path / name).read_text())
        content.pop(part, None)
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"is incomplete \('{part}'\); name another checkpoint"):
        RunState.read(tmp_path)
