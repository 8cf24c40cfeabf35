"""Where a run may write: what can't be written or is in the way is one line before anything else is done."""

import os

import pytest
from runs import arguments, mistake, start

from hf_mae.errors import CheckpointError
from hf_mae.keys.run_keys import PretrainRecipe
from hf_mae.training.resume import check_folder, check_same_recipe

NAMES = ["metrics.jsonl", "bad_samples.jsonl", "run_config.yaml", "results.json", "config.json", "model.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name} is a folder where the run needs a file; move it away"):
        check_folder(PretrainRecipe(), tmp_path)


@pytest.mark.parametrize("name", [".tmp-files", ".tmp-checkpoint-7", "checkpoint-20"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=f"{name} is a file where the run needs a folder; move it away"):
        check_folder(PretrainRecipe(save_steps=10), tmp_path)


def test_files_that_are_in_nobodys_way_stay(tmp_path):
    for name in ("checkpoint-8", "checkpoint-best", ".tmp-123-results.json", "notes"):
        (tmp_path / name).write_text("")
    check_folder(PretrainRecipe(save_steps=10), tmp_path)


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("/dev/null/x", "/dev/null is not a folder"), ("file", "file is not a folder"),
        (os.fsdecode(b"r\xff"), "surrogates"),
        ("a" * 300, "File name too long"),
    ],
    ids=["below a device", "file", "not UTF-8", "long"],
)  # fmt: skip
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys, folder, why, dry_run):
    (tmp_path / "file").write_text("")
    message = mistake(capsys, *arguments(tmp_path / folder, dry_run=dry_run))
    assert why in message
    assert message.endswith("; choose another --output_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_the_system_refuses_to_make_is_one_line_before_the_first_step(capsys):
    assert start(*arguments("/proc/x")) == 2
    assert "/proc/x can't be written (" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["epochs", "total_steps"])
def test_another_length_is_refused_with_its_reason_and_the_remedy(tmp_path, key):
    old = PretrainRecipe(**{key: 20}).to_dict()
    message = rf"with {key} 20, not 30; the length of a run can't change, .*--model and another --output_dir$"
    with pytest.raises(CheckpointError, match=message):
        check_same_recipe(old, PretrainRecipe(**{key: 30}), tmp_path, set())


def test_another_seed_is_refused_without_a_word_about_the_length(tmp_path):
    with pytest.raises(CheckpointError, match=r"with seed 0, not 1; use the same recipe"):
        check_same_recipe(PretrainRecipe().to_dict(), PretrainRecipe(seed=1), tmp_path, set())
