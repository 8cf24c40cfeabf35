import hashlib
import io
import json
import os
import shlex
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from bad_images import encoded, noise, npy, tiff
from pages import block
from PIL import Image
from runs import run, spawn, start

pytest.importorskip("datasets")
import datasets
import pyarrow.parquet as pq

from hf_mae.data.decode import BadImage, decode_image, probe_image
from hf_mae.data.order import Rows
from hf_mae.data.prepare import prepare, reencode
from hf_mae.data.sources import open_source
from hf_mae.errors import DataError
from hf_mae.image_processing_base_mae import resize_bands
from hf_mae.keys.data_keys import PrepareRecipe

BICUBIC = Image.Resampling.BICUBIC


def photo(width: int, height: int) -> Image.Image:
    """Something smooth, as photographs are."""
    return Image.fromarray(noise(4, 3)).resize((width, height), BICUBIC)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes and two splits of images, one of them broken."""
    for split, count in (("train", 23), ("val", 5)):
        for number in range(count):
            path = tmp_path / "images" / split / ("cat" if number % 3 else "dog") / f"{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(photo(40 + number, 30), "JPEG"))
    path = tmp_path / "images" / "train" / "cat" / "07.jpg"
    path.write_bytes(encoded(photo(40, 30), "JPEG")[:-100])
    return tmp_path / "images"


def options(source, dest, **keys) -> PrepareRecipe:
    keys = {"shortest_edge": 16, "rows_per_shard": 7, "num_workers": 0, "max_bad_fraction": 0.1, **keys}
    return PrepareRecipe(dataset=str(source), output_dir=str(dest), **keys)


def contents(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ------------------------------------------------------------------------------------------ an image


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60), (401, 40)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP"])
def test_colour_and_gray_of_8_bits_become_a_jpeg_of_the_shorter_side(width, height, mode, format):
    if mode == "CMYK" and format != "JPEG":
        mode = "RGB"
    data = encoded(photo(width, height).convert(mode), format)
    small = opened(reencode(data, 20, 95))
    assert (small.format, small.mode) == ("JPEG", mode)
    assert min(small.size) == 20
    assert max(small.size) == round(max(width, height) / 2)
    expected = opened(encoded(opened(data).resize(small.size, BICUBIC), "JPEG", quality=95))
    assert small.tobytes() == expected.tobytes()


def test_an_image_that_is_not_larger_keeps_its_bytes():
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (
        encoded(photo(30, 20), "JPEG", exif=exif), encoded(photo(20, 20)), npy(noise(19, 30)),
        encoded(photo(60, 20), "GIF"), tiff(np.zeros((20, 30, 13), np.uint16)),
    ):  # fmt: skip
        assert reencode(data, 20, 90) is data


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "transparent P", "1"])
def test_what_is_not_plain_colour_or_gray_becomes_a_png_without_loss(mode):
    image = photo(60, 40).convert("RGBA")
    image.putalpha(Image.fromarray(noise(60, 40)[:, :, 0]))
    image = image.quantize(16) if mode.endswith("P") else image.convert(mode)
    data = encoded(image, transparency=3) if mode == "transparent P" else encoded(image)
    small = opened(reencode(data, 20, 90))
    wanted = {"P": "RGBA" if image.has_transparency_data else "RGB", "transparent P": "RGBA", "1": "L"}.get(mode, mode)
    assert (small.format, small.mode, small.size) == ("PNG", wanted, (30, 20))
    expected = opened(data).convert(wanted).resize((30, 20), BICUBIC)
    assert np.array_equal(np.asarray(small), np.asarray(expected))


def test_more_bits_and_more_bands_are_kept():
    deep = np.random.default_rng(0).integers(0, 65_536, (40, 60), dtype=np.uint16)
    expected = resize_bands(deep[:, :, None], (20, 30), BICUBIC)
    for data in (encoded(Image.fromarray(deep)), npy(deep), tiff(deep), deep, deep[None], deep.astype(">u2")):
        small = reencode(data, 20, 90)
        assert opened(small).format == "PNG"
        assert probe_image(small) == (1, "uint16")
        assert np.array_equal(decode_image(small, 1, "uint16"), expected)
    bands = np.random.default_rng(0).normal(size=(40, 60, 13)).astype(np.float32)
    for data in (npy(bands), bands, tiff(np.moveaxis(bands, -1, 0)), bands.astype(np.float64)):
        small = reencode(data, 5, 90)  # fewer rows than bands
        assert np.array_equal(decode_image(small, 13, "float32"), resize_bands(bands, (5, 8), BICUBIC))
    wide = np.random.default_rng(0).integers(-5, 10**6, (40, 60))
    small = np.load(io.BytesIO(reencode(wide, 20, 90)))
    assert (small.dtype, small.shape) == (wide.dtype, (20, 30))
    assert np.abs(small - resize_bands(wide[:, :, None].astype(np.float32), (20, 30), BICUBIC)[:, :, 0]).max() <= 5.5
    mask = opened(reencode(np.eye(8, dtype=bool), 20, 90))
    assert np.array_equal(np.asarray(mask), np.eye(8) * 255)


@pytest.mark.parametrize(
    ("dtype", "bands", "nodata"),
    [("uint8", 1, 0), ("uint8", 3, 255), ("uint16", 1, 65_535), ("uint8", 13, 0), ("int16", 2, -9999), ("f4", 2, 0)],
)
def test_pixels_of_a_value_are_not_blended_with_others(dtype, bands, nodata):
    image = np.random.default_rng(0).integers(100, 200, (40, 60, bands)).astype(dtype)
    image[:, :30] = nodata
    data = encoded(Image.fromarray(image.squeeze())) if bands in (1, 3) else npy(image)
    read = "float32" if dtype in ("int16", "f4") else dtype
    found, blended = (np.asarray(decode_image(reencode(data, 20, 90, one), bands, read)) for one in (nodata, None))
    found, blended = found.reshape(20, 30, bands), blended.reshape(20, 30, bands)
    assert (found[:, :15] == nodata).all()
    assert (100 <= found[:, 15:].min()) & (found[:, 15:].max() < 200)
    assert not (blended[:, 14] == nodata).all()


def test_the_value_of_missing_pixels_is_recorded_and_another_refused(tmp_path, capsys):
    (tmp_path / "i").mkdir()
    Image.fromarray(np.eye(40, dtype=np.uint8)).save(tmp_path / "i" / "a.png")
    words = ["prepare", tmp_path / "i", tmp_path / "out", "--shortest_edge", 20, "--num_workers", 0, "--nodata"]
    assert start(*words, 0) == 0
    assert f"use it   hf-mae pretrain --dataset {tmp_path / 'out'} --nodata 0\n" in capsys.readouterr().out
    assert "--quality 90 --nodata 0`" in (tmp_path / "out" / "README.md").read_text()
    assert start(*words, -9999) == 2
    assert "was prepared with nodata 0.0, not -9999.0" in capsys.readouterr().err


def test_no_pixel_becomes_one_of_the_missing_value_and_an_empty_image_is_bad():
    edge = np.full((40, 60), 2, np.uint8)
    edge[:, 25:] = 250
    assert (np.asarray(opened(reencode(edge, 20, 90))) == 0).any()  # the filter overshoots
    assert np.asarray(opened(reencode(edge, 20, 90, 0))).min() == 2
    cmyk = opened(reencode(encoded(photo(60, 40).convert("CMYK"), "JPEG"), 20, 90, 0))
    assert (cmyk.format, cmyk.mode, cmyk.size) == ("PNG", "RGB", (30, 20))
    with pytest.raises(BadImage, match="every pixel has the nodata value 0"):
        reencode(np.zeros((40, 60), np.uint8), 20, 90, 0)


@pytest.mark.parametrize("data", [b"", b"no image", encoded(photo(60, 40), "JPEG")[:-200], np.array([["a", "b"]])])
def test_what_training_would_skip_is_a_bad_image(data):
    with pytest.raises(BadImage):
        reencode(data, 20, 90)


def test_a_large_photograph_shows_what_it_did():
    image = photo(1000, 800)
    small = opened(reencode(encoded(image, "JPEG"), 40, 95))
    assert small.size == (50, 40)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(image.resize((50, 40), BICUBIC))).mean() < 2


# ------------------------------------------------------------------------------------------ a data set


def test_splits_labels_and_counts_are_kept_and_bad_images_named(folder, tmp_path):
    manifest = prepare(options(folder, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert {name: (split["rows"], len(split["shards"])) for name, split in manifest["splits"].items()} == {
        "train": (22, 4),
        "validation": (5, 1),
    }
    assert manifest["splits"]["train"]["bad"] == {"OSError": 1}
    lines = (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"split": "train", "key": "train/cat/07.jpg", "reason": "OSError"}]
    hashes = contents(tmp_path / "out")
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            assert hashes[shard["file"]] == shard["sha256"]
            assert (tmp_path / "out" / shard["file"]).stat().st_size == shard["bytes"]
    loaded = datasets.load_dataset(str(tmp_path / "out"))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 22, "validation": 5}
    assert loaded["train"].features == datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    assert {min(row["image"].size) for row in loaded["train"]} == {16}
    for split in ("train", "validation"):
        source = open_source(str(folder), split=split)
        wanted = {row.key: row.label for row in Rows(source).read(np.arange(len(source)))}
        raw = loaded[split].cast_column("image", datasets.Image(decode=False))
        assert {row["image"]["path"]: row["label"] for row in raw} == {
            key: label for key, label in wanted.items() if key != "train/cat/07.jpg"
        }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| train | 22 | 4 | 1 |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("streaming", [None, True])
def test_what_was_prepared_is_read_by_the_same_flag(folder, tmp_path, streaming):
    prepare(options(folder, tmp_path / "out"))
    rows = Rows(open_source(str(tmp_path / "out"), split="train", streaming=streaming))
    assert rows.source.label_names == ["cat", "dog"]
    found = list(rows.read(np.arange(len(rows))))
    assert Counter(row.label for row in found) == {0: 14, 1: 8}
    assert {min(decode_image(row.image, 3).size) for row in found} == {16}


def test_the_digits_are_prepared_without_loss_and_trained_on(tmp_path):
    source = open_source("digits")
    assert start("prepare", "digits", tmp_path / "out", "--rows_per_shard", 1000, "--num_workers", 0) == 0
    rows = Rows(open_source(str(tmp_path / "out")))
    assert len(rows) == len(source) == 1797
    for row, original in zip(rows.read(rows.index[::50]), Rows(source).read(rows.index[::50]), strict=True):
        assert np.array_equal(decode_image(row.image, 1), original.image[:, :, 0])
        assert row.label == original.label
    run(tmp_path / "run", dataset=tmp_path / "out", total_steps=2)


def test_labels_without_names_and_none_at_all_are_kept_as_they_are(tmp_path):
    images = [{"bytes": encoded(photo(30, 20 + i)), "path": None} for i in range(5)]
    for labels, feature in (
        ([[0, 3], [], [1], [2, 4], []], datasets.List(datasets.Value("int64"))),
        ([0.5, 1.5, None, 2.0, 7.0], datasets.Value("float64")),
        (None, None),
    ):
        features = {"image": datasets.Image(), **({"label": feature} if feature else {})}
        columns = {"image": images, **({"label": labels} if feature else {})}
        source, dest = tmp_path / f"{feature}.parquet".replace("(", "").replace(")", ""), tmp_path / f"out {feature}"
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(source)
        prepare(options(source, dest))
        loaded = datasets.load_dataset(str(dest), split="train")
        assert loaded.features == datasets.Features(features)
        assert labels is None or loaded["label"][:] == labels


# ------------------------------------------------------------------------------------------ again, and after a kill


def test_what_is_there_is_not_done_again_and_what_is_missing_or_broken_is(folder, tmp_path):
    out = tmp_path / "out"
    prepare(options(folder, out))
    whole = contents(out)
    shards = sorted((out / "data").iterdir())
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-50])
    (out / "data" / ".tmp-1-train-00001-of-00004.parquet").write_bytes(b"half")
    (out / "manifest.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in (shards[0], shards[3], shards[4])}
    prepare(options(folder, out))
    assert contents(out) == whole
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_folder_of_another_preparation_is_refused(folder, tmp_path):
    prepare(options(folder, tmp_path / "out"))
    for changed, said in (
        ({"shortest_edge": 12}, "shortest_edge 16, not 12"),
        ({"quality": 50}, "quality 90, not 50"),
        ({"rows_per_shard": 9}, "from another run"),
        ({"split": "validation"}, "from another run"),
    ):
        with pytest.raises(DataError, match=said):
            prepare(options(folder, tmp_path / "out", **changed))
    (folder / "train" / "cat" / "01.jpg").write_bytes(encoded(photo(99, 30), "JPEG"))
    with pytest.raises(DataError, match="another source"):
        prepare(options(folder, tmp_path / "out"))


@pytest.mark.parametrize(
    "record", ["", "[1]", "{}", '"text"', "[" * 100_000, '{"settings": 3, "bad": []}', '{"settings": {}, "bad": [1]}']
)
def test_a_shard_with_the_metadata_of_another_program_is_refused(folder, tmp_path, record):
    prepare(options(folder, tmp_path / "out"))
    shard = tmp_path / "out" / "data" / "train-00001-of-00004.parquet"
    pq.write_table(pq.read_table(shard).replace_schema_metadata({"hf_mae": record}), shard)
    with pytest.raises(DataError, match=rf"^{shard} was not written by hf-mae prepare: .*; name another folder, or re"):
        prepare(options(folder, tmp_path / "out"))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="reading it is an error of the kind that a disk has")
def test_an_image_that_the_disk_cannot_read_is_not_reported_as_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to("/proc/self/mem")
    with pytest.raises(
        DataError, match=rf"^cannot read {tmp_path}/images/a.png: .*Input/output error; check the disk$"
    ):
        prepare(options(tmp_path / "images", tmp_path / "out"))


def test_faults_of_the_user_are_told_in_one_line(folder, tmp_path, capfd):
    assert start("prepare", folder, tmp_path / "out", "--num_workers", 0) == 2
    assert "1 of 23 images" in capfd.readouterr().err
    assert start("prepare", folder, tmp_path / "out", "--quality", 101) == 2
    assert "quality 101 is out of range; give a number in [1, 95]" in capfd.readouterr().err
    assert start("prepare", folder) == 2
    assert "--output_dir is missing" in capfd.readouterr().err
    (tmp_path / "file").write_text("")
    assert start("prepare", folder, tmp_path / "file", "--max_bad_fraction", 1) == 2
    assert "can't be written" in capfd.readouterr().err


@pytest.mark.slow
def test_the_commands_of_the_page_run(folder, tmp_path, monkeypatch):
    (tmp_path / "path" / "to").mkdir(parents=True)
    folder.rename(tmp_path / "path" / "to" / "images")
    monkeypatch.chdir(tmp_path)
    extra = {
        "prepare": ["--max_bad_fraction", 1],
        "pretrain": ["--total_batch_size", 8, "--per_device_batch_size", 8, "--dry_run", "true"],
    }
    for line in block("--dataset outputs/images_256", "docs/data.md", "bash").splitlines():
        _, command, *words = shlex.split(line)
        assert start(command, *words, *extra.pop(command)) == 0
    assert not extra


@pytest.mark.slow
def test_workers_write_the_same_bytes(folder, tmp_path):
    for workers in (0, 2):
        prepare(options(folder, tmp_path / str(workers), num_workers=workers))
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.jpg").write_bytes(encoded(photo(1200 + number, 900), "JPEG"))
    prepare(options(folder, tmp_path / "whole", rows_per_shard=2))
    command = ["-m", "hf_mae.cli", "prepare", folder, out, "--shortest_edge", 16, "--rows_per_shard", 2]
    kills = 0
    for attempt in range(30):
        process = spawn([*command, "--num_workers", 1 + attempt % 2], tmp_path / "log")
        before = list(out.glob("data/train*"))
        while process.poll() is None and len(list(out.glob("data/train*"))) < len(before) + 3:
            time.sleep(0.005)
        if process.poll() is not None:
            assert process.returncode == 0, (tmp_path / "log").read_text()
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        assert not (out / "manifest.json").exists()
    assert kills >= 3
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(("dtype", "nodata"), [("uint8", 150), ("int16", 150), ("f4", 150.0)])
def test_a_value_within_the_range_of_the_data_is_kept_for_missing_pixels(dtype, nodata):
    image = np.tile(np.repeat([100, 200], 8), (40, 4))[:, :, None].astype(dtype)  # between the two lies 150
    read = "uint8" if dtype == "uint8" else "float32"
    small, plain = (
        np.asarray(decode_image(reencode(npy(image), 20, 90, one), 1, read)).reshape(20, 32) for one in (nodata, None)
    )
    assert not (small == nodata).any()
    assert np.abs(small.astype(float) - plain.astype(float)).max() <= 16  # but for the overshoot at the steps
