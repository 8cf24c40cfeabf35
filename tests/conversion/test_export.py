"""`hf-mae export`: what the files compute is what the model computes, for any batch; mistakes are one line."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from pages import block
from PIL import Image
from runs import environment, start
from tiny import pixels, tiny
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.utils import logging as transformers_logging

from hf_mae import MAEBackbone, MAEForImageClassification, MAEForPreTraining, MAEImageProcessor, MAEModel
from hf_mae.conversion import export as export_module

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'hf-mae[export]'")
transformers_logging.disable_progress_bar()

CLASSIFIER = {"num_labels": 3, "pooling": "cls"}
RUN_WITHOUT_US = """
import sys, numpy, torch
sys.modules["hf_mae"] = None
graph = torch.export.load(sys.argv[1]).module()
outputs = graph(torch.from_numpy(numpy.load("pixels.npy")))
numpy.save("out.npy", outputs[-1].detach().numpy())
"""


def save(model_class, folder, **keys):
    tiny(model_class, image_size=(32, 48), **keys).save_pretrained(folder)
    MAEImageProcessor(crop_size={"height": 32, "width": 48}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    return folder


def run_onnx(folder, images):
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"pixel_values": images.numpy()})), strict=True))


@pytest.mark.slow
@torch.no_grad()
def test_the_encoder_of_a_pretraining_model_in_onnxruntime(tmp_path, capsys):
    save(MAEForPreTraining, tmp_path / "model")
    capsys.readouterr()
    assert start("export", tmp_path / "model", tmp_path / "out", "--to", "onnx") == 0
    said = capsys.readouterr().out
    assert "encoder with pixel_values (batch, 3, 32, 48)" in said
    assert "pooler_output (batch, 48): any batch, this image size" in said
    encoder = AutoModel.from_pretrained(tmp_path / "model").eval()
    for batch in (1, 3, 7):
        images = pixels(batch, 3, 32, 48, seed=batch)
        got, expected = run_onnx(tmp_path / "out", images), encoder(images)
        assert list(got) == ["last_hidden_state", "pooler_output"]
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
    with pytest.raises(Exception, match="pixel_values"):
        run_onnx(tmp_path / "out", pixels(1, 3, 32, 32))
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean) == [0.1, 0.2, 0.3]
    assert AutoConfig.from_pretrained(tmp_path / "out").grid_size == (4, 6)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert str(tmp_path).encode() not in (tmp_path / "out" / "model.onnx").read_bytes()
    assert b"hf_mae/modeling_mae.py" not in (tmp_path / "out" / "model.onnx").read_bytes()


@torch.no_grad()
def test_a_classifier_in_torch_export_runs_without_this_package(tmp_path, capsys):
    save(MAEForImageClassification, tmp_path / "model", **CLASSIFIER)
    capsys.readouterr()
    assert start("export", tmp_path / "model", tmp_path / "out", "--to", "torch_export") == 0
    assert "classifier with pixel_values (batch, 3, 32, 48) -> logits (batch, 3)" in capsys.readouterr().out
    images = pixels(4, 3, 32, 48)
    np.save(tmp_path / "pixels.npy", images.numpy())
    command = [sys.executable, "-c", RUN_WITHOUT_US, tmp_path / "out" / "model.pt2"]
    subprocess.run(command, cwd=tmp_path, env=environment(), check=True)
    expected = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()(images).logits
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), expected, atol=1e-6, rtol=1e-6)
    graph = torch.export.load(tmp_path / "out" / "model.pt2").module()
    assert graph(pixels(1, 3, 32, 48))[0].shape == (1, 3)


@pytest.mark.slow
@torch.no_grad()
def test_a_classifier_in_onnxruntime_and_an_encoder_in_torch_export(tmp_path):
    save(MAEForImageClassification, tmp_path / "classifier", num_labels=3)
    save(MAEModel, tmp_path / "encoder")
    assert start("export", tmp_path / "classifier", tmp_path / "out") == 0
    assert start("export", tmp_path / "encoder", tmp_path / "pt2", "--to", "torch_export") == 0
    images = pixels(3, 3, 32, 48)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier").eval()
    (logits,) = run_onnx(tmp_path / "out", images).values()
    torch.testing.assert_close(logits, classifier(images).logits, atol=1e-5, rtol=1e-5)
    encoder = AutoModel.from_pretrained(tmp_path / "encoder").eval()(images)
    tokens, pooled = torch.export.load(tmp_path / "pt2" / "model.pt2").module()(images)
    torch.testing.assert_close(tokens, encoder.last_hidden_state, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(pooled, encoder.pooler_output, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_the_pages_lines_run_an_exported_model(tmp_path, monkeypatch):
    save(MAEForPreTraining, tmp_path / "outputs" / "mine")
    monkeypatch.chdir(tmp_path)
    assert start("export", "outputs/mine", "outputs/mine_onnx") == 0
    Image.effect_noise((50, 40), 50).convert("RGB").save("photo.jpg")
    names: dict = {}
    exec(compile(block("onnxruntime", "docs/export.md"), "docs/export.md", "exec"), names)
    images = names["processor"](names["image"], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = AutoModel.from_pretrained("outputs/mine").eval()(images).pooler_output
    torch.testing.assert_close(torch.from_numpy(names["features"]), expected, atol=1e-5, rtol=1e-5)


def fails(capfd, *words) -> str:
    capfd.readouterr()
    assert start("export", *words) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("hf-mae: error: ")


def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch, capfd):
    save(MAEModel, tmp_path / "model")

    def wrong(tensors, images, file):
        file.write_bytes(b"a graph")
        return lambda batch: tuple(value * 1.001 for value in tensors(batch))

    monkeypatch.setitem(export_module.WRITERS, "onnx", ("model.onnx", wrong))
    message = fails(capfd, tmp_path / "model", tmp_path / "out")
    assert message.startswith("the model and its onnx graph differ for 1 images (last_hidden_state: a difference of")
    assert message.endswith("nothing was written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_mistakes_are_one_line_with_the_remedy(tmp_path, monkeypatch, capfd):
    save(MAEForPreTraining, tmp_path / "model")
    save(MAEBackbone, tmp_path / "backbone")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert "already exists and is not empty; name another folder" in fails(capfd, tmp_path / "model", tmp_path / "full")
    assert "holds a MAEBackbone; give one of MAEForPreTraining" in fails(capfd, tmp_path / "backbone", tmp_path / "out")
    assert "there is no file or folder" in fails(capfd, tmp_path / "nowhere", tmp_path / "out")
    assert "--to 'onxx' is not one of onnx, torch_export" in fails(
        capfd, tmp_path / "model", tmp_path / "out", "--to", "onxx"
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    assert "can't load" in fails(capfd, tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(package, tmp_path, monkeypatch, capfd):
    save(MAEModel, tmp_path / "model")
    monkeypatch.setitem(sys.modules, package, None)
    message = fails(capfd, tmp_path / "model", tmp_path / "out")
    assert message == f"hf-mae export needs the package {package}: pip install 'hf-mae[export]'"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
