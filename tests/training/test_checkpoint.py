import errno
import json
import logging
import os
import shutil
import stat

import pytest
import torch
from safetensors import SafetensorError
from tiny import draw_noise, pixels, tiny

from hf_mae import MAEForPreTraining, MAEImageProcessor
from hf_mae.errors import CheckpointError, DiskFullError
from hf_mae.files import write_json
from hf_mae.optim.groups import adamw
from hf_mae.run_folder import RunFolder
from hf_mae.training.checkpoint import (
    find_checkpoint,
    full_state_dict,
    load_optimizer_tensors,
    load_tensors,
    optimizer_tensors,
    save_tensors,
    verify_checkpoint,
    write_checkpoint,
    write_model,
)


def step(model, optimizer, number: int) -> float:
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 / number
    loss = model(pixels(seed=number), noise=draw_noise(seed=number)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def trained(steps: int = 2):
    torch.manual_seed(0)
    model = tiny(MAEForPreTraining)
    optimizer = adamw(model, (0.9, 0.95), 0.05)
    for number in range(1, steps + 1):
        step(model, optimizer, number)
    return model, optimizer


def write_all(model, optimizer):
    """What a run writes into a checkpoint."""

    def write(folder):
        model.save_pretrained(folder, state_dict=full_state_dict(model))
        MAEImageProcessor(num_channels=3).save_pretrained(folder)
        save_tensors(optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
        write_json(folder / "trainer.json", {"step": 2})
        write_json(folder / "data.json", {"positions": [1, 2]})

    return write


def write_small(folder):
    save_tensors({"weight": torch.arange(3.0)}, folder / "model.safetensors")
    write_json(folder / "trainer.json", {"step": 1})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint as a run writes it; not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("run"), 2, write_all(*trained()), keep=2)


FILES = [
    "COMPLETE", "config.json", "data.json", "model.safetensors", "optimizer.safetensors", "preprocessor_config.json",
    "trainer.json",
]  # fmt: skip


# ------------------------------------------------------------------------------------------ what is in it


def test_a_checkpoint_holds_safetensors_and_json_alone(whole):
    assert whole.name == "checkpoint-2"
    assert sorted(path.name for path in whole.iterdir()) == FILES
    assert set(json.loads((whole / "COMPLETE").read_text())) == set(FILES) - {"COMPLETE"}
    for path in whole.iterdir():
        if path.suffix == ".safetensors":
            assert path.read_bytes()[8:9] == b"{"
        else:
            json.loads(path.read_text())
    verify_checkpoint(whole)
    assert list(whole.parent.iterdir()) == [whole]


def test_a_checkpoint_loads_as_a_model(whole):
    model, _ = trained()
    loaded, info = MAEForPreTraining.from_pretrained(whole, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert MAEImageProcessor.from_pretrained(whole).num_channels == 3


def test_a_run_that_goes_on_from_a_checkpoint_is_the_uninterrupted_one(whole):
    model, optimizer = trained(steps=4)
    again = MAEForPreTraining.from_pretrained(whole).eval()
    optimizer_again = adamw(again, (0.9, 0.95), 0.05)
    tensors = load_tensors(whole / "optimizer.safetensors")
    load_optimizer_tensors(again, optimizer_again, tensors)
    assert tensors["mae.layers.0.mlp.fc1.weight.step"].item() == 2
    for number in (3, 4):
        step(again, optimizer_again, number)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    saved, expected = optimizer_tensors(again, optimizer_again), optimizer_tensors(model, optimizer)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert set(expected) == {f"{name}.{key}" for name in trainable for key in ("step", "exp_avg", "exp_avg_sq")}


def test_without_the_optimizers_state_another_run_results(whole):
    model, _ = trained(steps=3)
    again = MAEForPreTraining.from_pretrained(whole).eval()
    step(again, adamw(again, (0.9, 0.95), 0.05), 3)
    assert not torch.equal(again.decoder.mask_token, model.decoder.mask_token)


def test_a_missing_state_of_a_parameter_is_refused_by_name(whole):
    model, _ = trained(steps=0)
    tensors = load_tensors(whole / "optimizer.safetensors")
    for key in ("step", "exp_avg_sq"):
        fewer = {name: tensor for name, tensor in tensors.items() if name != f"decoder.mask_token.{key}"}
        with pytest.raises(
            CheckpointError, match=r"lacks the state of decoder.mask_token; name a checkpoint of this model"
        ):
            load_optimizer_tensors(model, adamw(model, (0.9, 0.95), 0.05), fewer)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_as_readable_as_the_users_others(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        folder = write_checkpoint(tmp_path / "run", 1, write_small, keep=2)
    finally:
        assert os.umask(before) == umask
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {mode}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


# ------------------------------------------------------------------------------------------ complete or absent


def test_a_write_that_fails_leaves_no_checkpoint_and_the_old_one_intact(tmp_path):
    old = write_checkpoint(tmp_path, 1, write_small, keep=2)

    def fail_half_way(folder):
        write_small(folder)
        raise OSError("no space left on device")

    for number in (1, 2):  # even of the same step
        with pytest.raises(OSError, match="no space left"):
            write_checkpoint(tmp_path, number, fail_half_way, keep=2)
        assert RunFolder(tmp_path).checkpoints() == [old]
        verify_checkpoint(old)
        assert find_checkpoint(tmp_path, "auto") == old
        assert sorted(tmp_path.iterdir()) == [old]  # nothing is left that would take up room
    new = write_checkpoint(tmp_path, 3, write_small, keep=2)
    assert sorted(tmp_path.iterdir()) == [old, new]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["disk", "quota", "safetensors"],
)
def test_a_full_disk_is_an_error_of_its_own_and_takes_up_no_room(tmp_path, error):
    old = write_checkpoint(tmp_path, 1, write_small, keep=2)

    def fill(folder):
        write_small(folder)
        raise error

    with pytest.raises(DiskFullError, match=r"no room for .*checkpoint-2"):
        write_checkpoint(tmp_path, 2, fill, keep=2)
    assert list(tmp_path.iterdir()) == [old]
    verify_checkpoint(old)


@pytest.mark.parametrize("at", ["sha256", "settle", "fsync"])
def test_a_run_that_dies_while_it_saves_leaves_no_checkpoint(tmp_path, monkeypatch, at):
    from hf_mae import files

    old, whole_function = write_checkpoint(tmp_path, 1, write_small, keep=2), getattr(files, at)
    calls = []

    def counting(path):
        calls.append(path)
        return whole_function(path)

    monkeypatch.setattr(files, at, counting)
    write_checkpoint(tmp_path / "other", 2, write_small, keep=2)
    before_rename = len(calls) - (at == "fsync")  # the last one is of the folder around it
    assert before_rename >= 2
    for survived in range(before_rename):
        left = iter(range(survived))

        def dying(path, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return whole_function(path)

        monkeypatch.setattr(files, at, dying)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path, 2, write_small, keep=2)
        monkeypatch.setattr(files, at, whole_function)
        assert find_checkpoint(tmp_path, "auto") == old


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write_checkpoint(tmp_path, 1, write_small, keep=2)
    folder = write_checkpoint(tmp_path, 1, lambda folder: write_json(folder / "only.json", "new"), keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["COMPLETE", "only.json"]
    verify_checkpoint(folder)


def test_an_old_checkpoint_that_cannot_be_removed_is_reported_and_the_new_one_stays(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    folders = [write_checkpoint(tmp_path, number, write_small, keep=2) for number in (1, 2, 3)]
    assert RunFolder(tmp_path).checkpoints() == folders
    verify_checkpoint(folders[2])
    (message,) = caplog.messages
    assert message.startswith(f"{folders[0]} can't be removed (")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["disk", "safetensors"],
)
def test_a_final_model_that_cannot_be_written_is_one_line_and_leaves_the_old_files(tmp_path, error):
    write_model(tmp_path, write_small)
    before = (tmp_path / "trainer.json").read_bytes()

    def fill(folder):
        write_json(folder / "trainer.json", {"step": 2})
        raise error

    with pytest.raises(CheckpointError, match=r"the final model can't be written into .* with --resume auto$"):
        write_model(tmp_path, fill)
    assert (tmp_path / "trainer.json").read_bytes() == before


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("file", [file for file in FILES if file != "COMPLETE"])
def test_one_flipped_byte_is_found_by_the_files_name(whole, tmp_path, file):
    folder = shutil.copytree(whole, tmp_path / whole.name)
    content = (folder / file).read_bytes()
    for place in (0, len(content) // 3, len(content) // 2, len(content) - 1):
        (folder / file).write_bytes(flipped(content, place))
        with pytest.raises(CheckpointError, match=f"{file} is not what was saved"):
            verify_checkpoint(folder)
        with pytest.raises(CheckpointError, match=f"all checkpoints in {tmp_path} are broken: "):
            find_checkpoint(tmp_path, "auto")
    (folder / file).write_bytes(content)
    verify_checkpoint(folder)


def test_a_flipped_byte_of_the_manifest_is_found_wherever_it_is(tmp_path):
    folder = write_checkpoint(tmp_path, 1, write_small, keep=2)
    manifest = folder / "COMPLETE"
    content = manifest.read_bytes()
    for place in range(len(content)):
        # White space says nothing; the rest may be punctuation, a key, a name, a number or a digest.
        if content[place : place + 1].strip():
            manifest.write_bytes(flipped(content, place))
            with pytest.raises(CheckpointError, match="checkpoint-1"):
                verify_checkpoint(folder)
    manifest.write_bytes(content)
    verify_checkpoint(folder)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_or_shortened_file_is_refused_by_its_name(whole, tmp_path, file):
    folder = shutil.copytree(whole, tmp_path / whole.name)
    content = (folder / file).read_bytes()
    for length in (0, len(content) // 2, len(content) - 1):
        (folder / file).write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=file):
            verify_checkpoint(folder)
    (folder / file).unlink()
    message = r"is not a complete checkpoint \(it has no COMPLETE" if file == "COMPLETE" else f"{file} is missing"
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(tmp_path, str(folder))


# ------------------------------------------------------------------------------------------ which one


def test_the_newest_complete_one_is_found_and_broken_ones_are_skipped_with_a_warning(tmp_path, caplog):
    assert find_checkpoint(tmp_path, "auto") is None
    folders = [write_checkpoint(tmp_path, number, write_small, keep=9) for number in (5, 90, 100)]
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-200").mkdir()  # without COMPLETE: not ours, or half removed
    assert RunFolder(tmp_path).checkpoints() == [*folders, tmp_path / "checkpoint-200"]  # by number, not by name
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path, "auto") == folders[2]
    assert "checkpoint-200 is not a complete checkpoint" in caplog.text
    caplog.clear()
    (folders[2] / "model.safetensors").write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path, "auto") == folders[1]
    (message,) = [text for text in caplog.messages if "model.safetensors" in text]
    assert "checkpoint-100" in message
    assert message.endswith("falling back to the one before")


@pytest.mark.parametrize(
    "text", ["[1]", "null", "{}", '{"a\\u0000b": 1}', '{"../../x": 1}', '{"%s": 1}' % ("a" * 300), '"a"']
)
def test_a_manifest_that_lists_no_file_of_the_checkpoint_makes_the_one_before_be_taken(tmp_path, caplog, text):
    one, two = (write_checkpoint(tmp_path, number, write_small, keep=9) for number in (1, 2))
    (two / "COMPLETE").write_text(text)
    assert find_checkpoint(tmp_path, "auto") == one
    (message,) = caplog.messages
    assert message.endswith("falling back to the one before")


def test_a_file_in_the_place_of_a_checkpoint_is_replaced(tmp_path):
    (tmp_path / "checkpoint-5").write_text("a file")
    assert find_checkpoint(tmp_path, str(write_checkpoint(tmp_path, 5, write_small, keep=2)))


def test_a_link_in_the_place_of_a_checkpoint_is_replaced_or_removed_and_its_target_stays(tmp_path):
    elsewhere = write_checkpoint(tmp_path / "elsewhere", 7, write_small, keep=2)
    for step in (1, 5):
        (tmp_path / f"checkpoint-{step}").symlink_to(elsewhere)
    for step in (5, 6):
        write_checkpoint(tmp_path, step, write_small, keep=2)
    verify_checkpoint(elsewhere)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-5", "checkpoint-6"]
    assert not any(path.is_symlink() for path in tmp_path.iterdir())


def test_a_named_checkpoint_is_taken_or_refused_never_replaced_by_another(tmp_path):
    one, two = (write_checkpoint(tmp_path, number, write_small, keep=9) for number in (1, 2))
    assert find_checkpoint(tmp_path, str(one)) == one
    (two / "trainer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"checkpoint-2/trainer.json is not what was saved \(its sha256 differs"):
        find_checkpoint(tmp_path, str(two))
    with pytest.raises(CheckpointError, match="checkpoint-3 is not a complete checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-3"))


def test_the_newest_stay_and_the_others_go_only_when_the_new_one_is_in_place(tmp_path, monkeypatch):
    removed = []

    def watched(path):
        verify_checkpoint(tmp_path / "checkpoint-1000")
        removed.append(path.name)
        rmtree(path)

    rmtree = shutil.rmtree
    for number in (8, 9, 10, 99):
        write_checkpoint(tmp_path, number, write_small, keep=9)
    monkeypatch.setattr(shutil, "rmtree", watched)
    write_checkpoint(tmp_path, 1000, write_small, keep=3)
    assert removed == ["checkpoint-8", "checkpoint-9"]
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == [
        "checkpoint-10",
        "checkpoint-99",
        "checkpoint-1000",
    ]


def test_a_new_checkpoint_never_goes_because_of_broken_ones_of_later_steps(tmp_path):
    # A run that falls back from two broken checkpoints, and is asked to stop before it reaches them again.
    for number in (10, 50, 60, 70):
        folder = write_checkpoint(tmp_path, number, write_small, keep=9)
        if number > 50:
            (folder / "model.safetensors").write_bytes(b"broken")
    assert find_checkpoint(tmp_path, "auto") == tmp_path / "checkpoint-50"
    new = write_checkpoint(tmp_path, 55, write_small, keep=2)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == [f"checkpoint-{n}" for n in (50, 55, 60, 70)]
    assert find_checkpoint(tmp_path, "auto") == new
