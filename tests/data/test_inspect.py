"""What `hf-mae inspect` finds: figures against numpy's, and every planted fault."""

import json

import numpy as np
import pytest
from image_sets import image_table, png
from PIL import Image
from runs import start

from hf_mae.data import inspect as module
from hf_mae.data.inspect import describe_inspection, inspect
from hf_mae.keys.data_keys import InspectRecipe


def look(dataset, **keys) -> dict:
    return inspect(InspectRecipe(dataset=str(dataset), **keys))[0]


def test_figures_of_digits_are_those_of_scikit_learns_images():
    found = look("digits")["splits"]["train"]
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16)
    (band,) = found["bands"]
    assert (band["mean"], band["std"]) == (pytest.approx(pixels.mean()), pytest.approx(pixels.std()))
    assert (band["min"], band["max"]) == (0, 255)
    assert [band[key] for key in ("p1", "p50", "p99")] == np.percentile(pixels, (1, 50, 99)).tolist()
    assert band["zeros"] == pytest.approx((pixels == 0).mean())
    assert band["no_data"] == 0
    assert band["image_mean"] == pytest.approx(pixels.mean() / 255)
    assert band["image_std"] == pytest.approx(pixels.std() / 255)
    assert found["labels"] == {str(digit): int((digits.target == digit).sum()) for digit in range(10)}
    assert (found["rows"], found["read"], found["decoded"], found["unlabelled"]) == (1797, 1797, 1797, 0)


def test_bands_without_data_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    tiles = rng.normal(500, 100, (6, 3, 8, 8)).astype(np.float32)
    tiles[:, 1, :2] = -9999
    tiles[2, 2, 0, 0] = np.nan
    tiles[:, 0] = 7
    for number, tile in enumerate(tiles):
        np.save(tmp_path / f"{number}.npy", tile)
    found = look(tmp_path, nodata=-9999)
    bands = found["splits"]["train"]["bands"]
    assert [band["no_data"] for band in bands] == pytest.approx([0, 1 / 4, 1 / 384])
    kept = tiles[:, 1, 2:].astype(np.float64)
    assert (bands[1]["mean"], bands[1]["std"]) == (pytest.approx(kept.mean()), pytest.approx(kept.std()))
    assert (bands[1]["min"], bands[1]["max"]) == (kept.min(), kept.max())
    assert (bands[0]["image_mean"], bands[0]["image_std"]) == (7, 1)
    assert "train: channel 0 is constant: 7" in found["faults"]
    assert "train: 6 images with pixels without data, first 0.npy" in found["faults"]


@pytest.fixture
def planted(tmp_path):
    """Two splits of two classes with one fault of each kind."""
    for split, numbers in (("train", range(12)), ("test", range(20, 26))):
        for number in numbers:
            file = tmp_path / "data" / split / ("cat" if number % 2 else "dog") / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(number))
    train, test = tmp_path / "data" / "train", tmp_path / "data" / "test"
    (train / "cat" / "copy.png").write_bytes(png(1))
    (test / "dog" / "leak.png").write_bytes(png(2))
    (train / "dog" / "cut.png").write_bytes(png(4)[:60])
    deep = np.full((4, 4), 40000, np.uint16)
    Image.fromarray(deep).save(train / "dog" / "deep.png")
    (train / "dog" / "photo.heic").write_bytes(b"not read")
    (test / "emu").mkdir()
    (test / "emu" / "26.png").write_bytes(png(26))
    return tmp_path / "data"


def test_every_planted_fault_is_named_with_its_first_image(planted):
    found = look(planted)
    lines = "\n".join(found["faults"])
    for words in (
        "train: 1 image can't be decoded: ",
        "first train/dog/cut.png",
        "train: images differ in depth: uint8 in 13 (first ",
        "uint16 in 1 (first train/dog/deep.png)",
        "train: images differ in number of channels: 3 in 13 (first ",
        "train: 1 image repeated, e.g. train/cat/1.png as train/cat/copy.png",
        "1 image in several splits, e.g. train/dog/2.png and test/dog/leak.png",
        "test: classes that train doesn't have: emu",
        "1 .heic file",
    ):
        assert words in lines
    assert all(fault in describe_inspection(found) for fault in found["faults"])
    assert describe_inspection(found).startswith(f"{planted} (imagefolder)\ntrain, test (splits from folder names)\n")
    assert "\n  labels    cat: 7, dog: 8, from class folders\n" in describe_inspection(found)
    assert (found["splits_from"], found["splits"]["test"]["labels_from"]) == ("folder names", "class folders")
    assert found["splits"]["train"]["copies"] == [["train/cat/1.png", "train/cat/copy.png"]]
    assert found["leaks"] == [{"train": "train/dog/2.png", "test": "test/dog/leak.png"}]
    json.dumps(found)


def test_nothing_wrong_is_said_aloud(tmp_path):
    image_table(range(9)).to_parquet(tmp_path / "train.parquet")
    found = look(tmp_path)
    assert found["faults"] == []
    assert found["splits"]["train"]["labels"] == {"cat": 3, "dog": 3, "emu": 3}
    assert describe_inspection(found).endswith("\nnothing wrong was found")


def test_a_large_data_set_is_sampled_and_the_table_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.png").write_bytes(png(number))
    found = look(tmp_path)
    assert found["splits"]["train"]["read"] == 1
    assert found["splits"]["train"]["labels"] == {"cat": 5, "dog": 5}  # they need no reading
    assert "train: 10 images; there was time to read 1 of them" in describe_inspection(found)


def test_the_command_prints_json_and_draws_a_sheet(planted, capsys, monkeypatch):
    monkeypatch.chdir(planted.parent)
    assert start("inspect", "data", "--output", "out/sheet.png", "--json") == 0
    assert json.loads(capsys.readouterr().out)["splits"]["test"]["rows"] == 8
    with Image.open("out/sheet.png") as sheet:
        assert sheet.width > 1000
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(2**16)}
    assert {(number, number, number) for number in (3, 5, 21, 24)} <= colours  # images of these numbers
    assert (0xB0, 0x00, 0x20) in colours  # the one that can't be decoded, and the faults
    assert start("inspect", "data", "--output", "data/sheet.png") == 2
    assert "lies inside the data set" in capsys.readouterr().err
