"""`--num_channels 4` on images with transparency, through every command that decodes images."""

import json

import numpy as np
import pytest
from PIL import Image
from runs import run, start
from tunings import tune

from hf_mae import MAEConfig, MAEImageProcessor

pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def rgba(tmp_path_factory):
    """24 images with transparency in two class folders."""
    folder = tmp_path_factory.mktemp("rgba")
    rng = np.random.default_rng(0)
    for number in range(24):
        path = folder / ("a", "b")[number % 2] / f"{number:02d}{('.png', '.webp', '.tif')[number % 3]}"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (12, 12, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(path, **({"lossless": True, "exact": True} if path.suffix == ".webp" else {}))
    return folder


def alphas(folder):
    return np.concatenate([np.asarray(Image.open(path))[:, :, 3].ravel() for path in sorted(folder.rglob("*.*"))]) / 255


def test_every_command_sees_the_transparency_as_the_fourth_channel(rgba, tmp_path, capsys):
    data = ["--dataset", rgba]
    capsys.readouterr()
    assert start("inspect", rgba, "--num_channels", 4, "--json") == 0
    found = json.loads(capsys.readouterr().out)["splits"]["train"]
    assert found["bands"][3]["image_mean"] == pytest.approx(alphas(rgba).mean(), rel=1e-12)
    assert (found["decoded"], found["bad"]) == (24, {})

    model = run(tmp_path / "run", dataset=rgba, num_channels=4, total_steps=2, total_batch_size=8, eval_steps=2)
    assert MAEConfig.from_pretrained(model).num_channels == 4
    # Of the images that training reads; the others are held out.
    assert MAEImageProcessor.from_pretrained(model).image_mean[3] == pytest.approx(alphas(rgba).mean(), abs=0.05)
    assert not (model / "bad_samples.jsonl").exists()

    few = ["--model", model, *data, "--num_workers", 0]
    assert start("embed", *few, "--output", tmp_path / "features.parquet") == 0
    assert pq.read_metadata(tmp_path / "features.parquet").num_rows == 24
    assert start("evaluate", "knn", *few, "--eval_dataset", rgba) == 0
    assert start("evaluate", "linear-probe", *few, "--eval_dataset", rgba, "--epochs", 1) == 0
    tune(tmp_path / "t", model=model, dataset=rgba, eval_dataset=rgba, rand_augment="none", total_steps=2, save_steps=2)
    assert MAEConfig.from_pretrained(tmp_path / "t").num_channels == 4

    assert start("prepare", rgba, tmp_path / "small", "--shortest_edge", 8, "--num_workers", 0) == 0
    capsys.readouterr()
    assert start("inspect", tmp_path / "small", "--num_channels", 4, "--json") == 0
    smaller = json.loads(capsys.readouterr().out)["splits"]["train"]["bands"]
    assert smaller[3]["image_mean"] == pytest.approx(found["bands"][3]["image_mean"], abs=0.01)
