"""Files from elsewhere run nothing, and files of a run tell nothing that their user did not."""

import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import REPOSITORY, arguments, environment, run, start, weights_hash
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from hf_mae import MAEModel
from hf_mae.conversion.pth import read_pth
from hf_mae.errors import UserError
from hf_mae.training.checkpoint import _seal, verify_checkpoint

TOKEN = "hf_canaryCANARYcanaryCANARYcanaryCANAR"


class Payload:
    """Unpickled by anything that trusts it, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path):
    """A file that must never come to be."""
    path = tmp_path / "canary"
    # The payload does work where it is trusted.
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.unlink()
    return path


# ------------------------------------------------------------------------------------------ .pth


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["whole", "beside the weights"])
def test_a_payload_in_a_pth_is_refused_and_runs_nothing(tmp_path, canary, zipped, place):
    content = Payload(canary) if place == "whole" else {"model": {"a": torch.ones(2)}, "args": Payload(canary)}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"evil.pth is refused: it holds .*, which could run code"):
        read_pth(tmp_path / "evil.pth")
    assert not canary.exists()
    if zipped:
        with pytest.raises(UserError, match="system"):
            read_pth(tmp_path / "evil.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path, canary):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(UserError):
        read_pth(tmp_path / "evil.pth")
    assert not canary.exists()


def test_the_originals_kind_of_pth_is_read(tmp_path):
    options = argparse.Namespace(model="mae_vit_base_patch16", blr=1.5e-4, dist_url="env://", world_size=64)
    torch.save({"model": {"cls_token": torch.ones(1, 1, 4)}, "epoch": 3, "args": options}, tmp_path / "full.pth")
    content = read_pth(tmp_path / "full.pth")
    assert content["model"]["cls_token"].tolist() == [[[1.0] * 4]]
    assert content["args"].blr == 1.5e-4
    # Allowed for this reading alone.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "full.pth", weights_only=True)


@pytest.mark.parametrize("content", [b"", b"no such thing", b"PK\x03\x04 cut off"])
def test_what_is_no_pth_or_not_there_is_an_error_of_one_line(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    for name in ("x.pth", "absent.pth"):
        with pytest.raises(UserError) as error:
            read_pth(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("finished") / "run", total_steps=2, save_steps=1)


NAMES = ["config.json", "model.safetensors", "optimizer.safetensors", "preprocessor_config.json", "trainer.json"]


@pytest.mark.parametrize("name", [*NAMES, "data.json", "COMPLETE"])
def test_a_checkpoint_in_which_a_file_became_a_pickle_runs_nothing(finished, tmp_path, canary, capfd, name):
    folder = shutil.copytree(finished / "checkpoint-1", tmp_path / "checkpoint-1")
    (folder / name).write_bytes(pickle.dumps(Payload(canary)))
    if name != "COMPLETE":  # whoever can write the file can write its hash
        (folder / "COMPLETE").unlink()
        _seal(folder)
        verify_checkpoint(folder)
    assert start(*arguments(tmp_path / "run", total_steps=2, save_steps=1, resume=folder)) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("hf-mae: error:")
    assert not canary.exists()


def test_pickles_beside_a_checkpoints_files_are_not_read(finished, tmp_path, canary):
    folder = shutil.copytree(finished / "checkpoint-1", tmp_path / "checkpoint-1")
    for name in (
        "pytorch_model.bin", "training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt",
        "random_states_0.pkl", "custom_checkpoint_0.pkl", "dl_state_dict.bin",
    ):  # fmt: skip
        (folder / name).write_bytes(pickle.dumps(Payload(canary)))
    (folder / "COMPLETE").unlink()
    _seal(folder)
    output_dir = run(tmp_path / "run", total_steps=2, save_steps=1, resume=folder)
    assert weights_hash(output_dir) == weights_hash(finished)
    assert not canary.exists()


def test_weights_that_are_a_pickle_are_refused(finished, tmp_path, canary, capfd):
    folder = shutil.copytree(finished, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"a": Payload(canary)}, folder / "pytorch_model.bin")
    assert start(*arguments(tmp_path / "run", model=folder, hidden_size=None)) == 2
    assert "can't be loaded" in capfd.readouterr().err
    assert not canary.exists()


# ------------------------------------------------------------------------------------------ code of a model


@pytest.fixture
def with_code(finished, tmp_path, canary):
    """A model whose configuration names code of its own, which makes the canary where it is imported."""
    folder = shutil.copytree(finished, tmp_path / "model")
    classes = "class Config: pass\nclass Model: pass\nclass Processor: pass\n"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n{classes}")
    for name, code in (
        ("config.json", {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}),
        ("preprocessor_config.json", {"AutoImageProcessor": "evil.Processor"}),
    ):  # fmt: skip
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "auto_map": code}))
    return folder


@pytest.mark.slow
def test_code_that_a_model_brings_along_is_not_run(with_code, tmp_path, canary):
    run(tmp_path / "run", model=with_code, total_steps=1, **dict.fromkeys(SHAPE))
    evaluation = ["--model", with_code, "--dataset", "digits", "--eval_split", "train", "--num_workers", "0"]
    assert start("evaluate", "knn", *evaluation, "--max_samples", "40", "--max_eval_samples", "20") == 0
    assert type(AutoModel.from_pretrained(with_code)) is MAEModel
    AutoConfig.from_pretrained(with_code)
    AutoImageProcessor.from_pretrained(with_code)
    assert not canary.exists()
    # It would have been, where the user trusts it.
    command = "import sys, transformers as t; t.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", command, with_code], env=environment(), capture_output=True, check=False)
    assert canary.exists()


SHAPE = [
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "decoder_hidden_size",
    "decoder_num_hidden_layers", "decoder_num_attention_heads", "decoder_intermediate_size",
]  # fmt: skip


def test_no_source_file_reads_pickles_or_trusts_code():
    files = sorted((REPOSITORY / "hf_mae").rglob("*.py"))
    assert len(files) > 20
    # The card tells its readers how to trust the code; the process that pulls a model back trusts the very bytes that
    # this package has just pushed, and no others (tests/hub/test_push.py).
    trusting = {
        "card.py": "snippet([], pinned, 'trust_remote_code=True')",
        "check.py": "measure(repo_id, revision=revision, trust_remote_code=True)",
    }
    for file in files:
        text = file.read_text()
        if file.parent.name == "hub" and file.name in trusting:
            text = text.replace(trusting[file.name], "", 1)
        loads = re.findall(r"torch\.load\(.*", text)
        assert all("weights_only=True" in load for load in loads), file
        for word in ("pickle.load", "pickle.dump", "allow_pickle=True", "trust_remote_code=True", "torch.save("):
            assert word not in text, f"{file} has {word}"


# ------------------------------------------------------------------------------------------ what a run writes


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_no_file_and_no_line_of_a_run_has_a_token_or_a_path_that_was_not_typed(tmp_path, canary):
    pytest.importorskip("tensorboard")
    (tmp_path / "pictures").mkdir()
    for number in range(30):
        Image.new("RGB", (12, 12), (number, 9, 9)).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    options = {
        "dataset": "pictures", "max_bad_fraction": 0.5, "log_with": "tensorboard", "total_batch_size": 8,
        "total_steps": 4, "save_steps": 2, "num_workers": 1,
    }  # fmt: skip
    variables = environment(HF_TOKEN=TOKEN, WANDB_API_KEY=TOKEN, HOME=str(tmp_path / "home"))
    command = [sys.executable, "-m", "hf_mae.cli", *arguments("run", **options)]
    said = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, check=True)
    files = contents(tmp_path / "run") | {Path("stdout"): said.stdout, Path("stderr"): said.stderr}
    assert len(files) > 20
    for path, content in files.items():
        assert TOKEN.encode() not in content, path
        assert str(tmp_path).encode() not in content, path
        assert str(REPOSITORY).encode() not in content, path
    assert not {path.suffix for path in files} & {".bin", ".pkl", ".pt", ".pth", ".pickle"}
