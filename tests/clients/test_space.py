"""The Space that `hf-mae demo --output_dir` writes from a sharded model is whole, or absent."""

import json
import shutil

import pytest
import torch
from peers import need, pretrainer
from tiny import draw_noise, pixels

from hf_mae import MAEForPreTraining, MAEImageProcessor
from hf_mae.cli import main

need("gradio")


@pytest.fixture
def sharded(tmp_path):
    model = pretrainer("ours")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    size = {"height": 32, "width": 32}
    MAEImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    return model, tmp_path / "model"


def test_a_sharded_model_is_copied_whole_and_loads_from_the_space(sharded, tmp_path):
    model, folder = sharded
    assert main(["demo", "--model", str(folder), "--output_dir", str(tmp_path / "space")]) == 0
    copied = tmp_path / "space" / "model"
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in copied.glob("model-*.safetensors")}
    loaded = MAEForPreTraining.from_pretrained(copied)
    with torch.no_grad():
        images, noise = pixels(2), draw_noise(2)
        assert torch.equal(loaded(images, noise=noise).logits, model(images, noise=noise).logits)
    assert (tmp_path / "space" / "app.py").exists()


@pytest.mark.parametrize("missing", ["model-00002", "model.safetensors.index.json", "config.json"])
def test_no_space_is_written_of_a_model_without_a_part(sharded, missing, tmp_path, capsys):
    _, folder = sharded
    for file in folder.glob(f"{missing}*"):
        file.unlink()
    assert main(["demo", "--model", str(folder), "--output_dir", str(tmp_path / "space")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_no_space_remains_when_a_copy_fails(sharded, tmp_path, capsys, monkeypatch):
    _, folder = sharded
    copy = shutil.copy

    def fails_at_a_shard(source, target):
        if "model-00003" in str(source):
            raise OSError(28, "No space left on device")
        return copy(source, target)

    monkeypatch.setattr("shutil.copy", fails_at_a_shard)
    assert main(["demo", "--model", str(folder), "--output_dir", str(tmp_path / "space")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
