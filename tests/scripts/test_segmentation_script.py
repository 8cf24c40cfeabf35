"""The segmentation example: its figures by hand, and a run of a few steps on shapes and on a folder of images."""

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import REPOSITORY
from tiny import tiny

from hf_mae import MAEBackbone, MAEForPreTraining, MAEImageProcessor


@pytest.fixture
def script(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location(
        "segmentation", REPOSITORY / "scripts" / "examples" / "segmentation.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "segmentation", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def start(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["segmentation.py", *map(str, words)])
    script.main()


def test_mean_iou_is_the_mean_over_the_classes_that_are_there(script):
    #                          predicted as 0, 1, 2, 3; of class 3 there is nothing
    table = torch.tensor([[5, 1, 0, 0], [2, 6, 0, 0], [0, 1, 3, 0], [0, 0, 0, 0]])
    assert script.mean_iou(table) == pytest.approx(100 * (5 / 8 + 6 / 10 + 3 / 4) / 3)


def test_image_and_classes_are_cropped_and_mirrored_as_one(script):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (6, 4)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    image = Image.fromarray(labels * 60).convert("RGB")
    mirrored = set()
    for seed in range(8):
        crop, cut = script.random_crop((image, labels), np.random.default_rng(seed), 32, (1.0, 1.0))
        assert crop.size == (32, 32)
        assert np.array_equal(np.array(crop)[:, :, 0], cut * 60)
        mirrored.add(cut[0].tobytes())
    assert len(mirrored) > 2
    small, cut = script.random_crop((image, labels), np.random.default_rng(0), 64, (0.5, 0.5))
    assert (cut[:48, :32] == script.IGNORED).sum() + (cut[:, 32:] == script.IGNORED).sum() >= 64 * 32
    assert (cut != script.IGNORED).sum() == 48 * 32
    assert small.size == (64, 64)


def test_the_encoder_learns_by_layers_and_everything_else_at_the_full_rate(script):
    recipe = replace(script.RECIPES["shapes"], lr=1.0, layer_decay=0.5, weight_decay=0.1)
    model = script.build(recipe, tiny(MAEBackbone, pyramid_scales=[4, 2, 1, 0.5]))
    of = {id(p): group for group in script.optimizer_groups(model, recipe) for p in group["params"]}
    assert len(of) == len(list(model.parameters()))
    for name, lr, decay in (
        ("backbone.embeddings.patch_embed.weight", 0.5**5, 0.1),
        ("backbone.layers.0.mlp.fc1.weight", 0.5**4, 0.1),
        ("backbone.layers.3.mlp.fc1.bias", 0.5, 0.0),
        ("backbone.pyramid.0.doublings.0.weight", 1.0, 0.1),
        ("decode_head.classifier.weight", 1.0, 0.1),
        ("decode_head.classifier.bias", 1.0, 0.0),
    ):
        group = of[id(model.get_parameter(name))]
        assert (group["lr"], group["weight_decay"]) == (lr, decay), name


@pytest.mark.slow
def test_a_run_compares_pretrained_with_random_weights_and_draws_them(script, monkeypatch, tmp_path, capsys):
    # Small gray images: the positions move to 32 x 32 pixels.
    tiny(MAEForPreTraining, image_size=8, patch_size=4, num_channels=1).save_pretrained("model")
    MAEImageProcessor(num_channels=1, image_mean=[0.4], image_std=[0.3]).save_pretrained("model")
    capsys.readouterr()
    start(script, monkeypatch, "--model", "model", "--steps", 2, "--picture", "out/seg.png")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "mIoU" in line] == ["random", "pretrained"]
    assert Image.open(tmp_path / "out" / "seg.png").size == (6 * 132, 4 * 132)


def test_a_folder_in_the_layout_of_ade20k_is_learnt_and_scored(script, monkeypatch, tmp_path, capsys):
    for split, count in (("training", 3), ("validation", 2)):
        for kind in ("images", "annotations"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
        for i in range(count):
            image, labels = script.draw_shapes(i, 64)
            image.crop((0, 0, 64, 48)).save(tmp_path / "data" / "images" / split / f"{i}.jpg")
            Image.fromarray(labels[:48] + np.uint8(1)).save(tmp_path / "data" / "annotations" / split / f"{i}.png")
    image, labels = script.read_pair(tmp_path / "data" / "images" / "training" / "0.jpg")
    assert np.array_equal(labels, script.draw_shapes(0, 64)[1][:48])
    start(script, monkeypatch, "--data", tmp_path / "data", "--steps", 2)
    assert "mIoU" in capsys.readouterr().out
    assert Image.open("outputs/segmentation.png").size == (2 * 132, 3 * 132)


def test_what_is_not_labelled_is_neither_learnt_nor_scored(script, tmp_path):
    for kind in ("images", "annotations"):
        (tmp_path / kind).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.jpg")
    Image.fromarray(np.array([[0, 1, 150, 3]] * 4, np.uint8)).save(tmp_path / "annotations" / "a.png")
    assert script.read_pair(tmp_path / "images" / "a.jpg")[1][0].tolist() == [255, 0, 149, 2]
