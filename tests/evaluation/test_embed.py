"""`hf-mae embed`: what it writes is what the frozen encoder gives."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from features import table_of
from PIL import Image
from runs import environment, start
from tiny import save_model

from hf_mae.data.order import Rows
from hf_mae.data.sources import open_source
from hf_mae.evaluation.encoder import FrozenEncoder

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model")


def embed(folder, output, *words, data="digits", code=0):
    few = ["--max_samples", 50, "--num_workers", 0, "--per_device_batch_size", 16]
    assert start("embed", "--model", folder, "--dataset", data, "--output", output, *few, *words) == code


def expected(folder, pooling="mean", data="digits"):
    return table_of(FrozenEncoder(folder, pooling), Rows(open_source(str(data)), max_samples=50))


@pytest.mark.parametrize("pooling", ["mean", "cls", "both", "patches"])
def test_parquet_holds_the_frozen_encoders_features_with_keys_and_labels(folder, tmp_path, pooling, capsys):
    output, table = tmp_path / "deep" / "features.parquet", expected(folder, pooling)
    embed(folder, output, "--pooling", pooling)
    written = pq.read_table(output)
    assert written.column_names == ["key", "label", "features"]
    assert written["key"].to_pylist() == table.keys
    assert written["label"].to_pylist() == [str(label) for label in table.labels]  # names, not numbers
    np.testing.assert_allclose(np.array(written["features"].to_pylist()), table.values, atol=1e-6)
    origin = json.loads(written.schema.metadata[b"hf_mae"])
    assert origin == {"model": folder, "dataset": "digits", "split": "train", "pooling": pooling}
    shape = " x ".join(map(str, table.values.shape[1:]))
    assert capsys.readouterr().out.splitlines()[2:] == [f"50 images, {shape} features each: {output}"]
    assert [path.name for path in output.parent.iterdir()] == ["features.parquet"]


def test_datasets_reads_the_parquet_file(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    embed(folder, tmp_path / "features.parquet")
    cache = str(tmp_path / "cache")
    read = datasets.load_dataset("parquet", data_files=str(tmp_path / "features.parquet"), cache_dir=cache)["train"]
    values = read.with_format("torch")["features"][:]
    torch.testing.assert_close(values, expected(folder).values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "patches"])
def test_numpy_holds_the_same_with_keys_and_labels_beside_it(folder, tmp_path, pooling):
    output, table = tmp_path / "features.npy", expected(folder, pooling)
    embed(folder, output, "--pooling", pooling)
    written = np.load(output, mmap_mode="r")
    assert written.dtype == np.float32
    np.testing.assert_allclose(written, table.values, atol=1e-6)
    rows = list(csv.DictReader((tmp_path / "features.csv").open()))
    assert [row["key"] for row in rows] == table.keys
    assert [row["label"] for row in rows] == [str(label) for label in table.labels]
    assert {path.name for path in tmp_path.iterdir()} == {"features.npy", "features.csv", "model"}


def pictures(path, count=6, broken=()):
    path.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (9, 9), np.uint8)).save(path / f"{number}.png")
    for number in broken:
        (path / f"{number}.png").write_bytes(b"broken")
    return path


@pytest.mark.parametrize("ending", ["parquet", "npy"])
def test_images_without_labels_and_images_that_can_not_be_decoded(folder, tmp_path, ending, caplog):
    data = pictures(tmp_path / "data", broken=[0, 1, 2, 4])
    words = ["--max_bad_fraction", 0.9, "--per_device_batch_size", 2]
    embed(folder, tmp_path / f"features.{ending}", *words, data=data)
    assert "4 of the 6 images of split train" in caplog.text
    if ending == "npy":
        assert np.load(tmp_path / "features.npy").shape == (2, 48)
        rows = list(csv.DictReader((tmp_path / "features.csv").open()))
        assert rows == [{"key": "3.png", "label": ""}, {"key": "5.png", "label": ""}]
    else:
        written = pq.read_table(tmp_path / "features.parquet")
        assert written["key"].to_pylist() == ["3.png", "5.png"]
        assert written["label"].to_pylist() == [None, None]


@pytest.mark.parametrize("ending", ["parquet", "npy"])
@pytest.mark.parametrize("broken", [[3], range(6)])
def test_nothing_is_written_where_too_many_images_are_bad(folder, tmp_path, ending, broken, capfd):
    data = pictures(tmp_path / "data", broken=broken)
    embed(folder, tmp_path / "out" / f"features.{ending}", data=data, code=2)
    said = "1 of the 6 images" if len(broken) == 1 else "none of the first images"
    assert said in capfd.readouterr().err
    assert list((tmp_path / "out").glob("*")) == []


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_names_that_are_not_utf8_are_written_as_escapes(folder, tmp_path, ending):
    (tmp_path / "images").mkdir()
    for name in (b"a\xff.png", b"b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / os.fsdecode(name), "PNG")
    output = tmp_path / f"features{ending}"
    embed(folder, output, data=tmp_path / "images")
    if ending == ".parquet":
        keys = pq.read_table(output)["key"].to_pylist()
    else:
        keys = [line["key"] for line in csv.DictReader(output.with_suffix(".csv").open(encoding="utf-8"))]
    assert keys == ["a\\udcff.png", "b.png"]


def test_a_file_that_was_there_stays_as_it_was_if_the_command_fails(folder, tmp_path):
    output = tmp_path / "features.npy"
    embed(folder, output)
    before = output.read_bytes()
    embed(folder, output, data=pictures(tmp_path / "data", broken=[3]), code=2)
    assert output.read_bytes() == before


MISTAKES = {
    "an ending that isn't known": (["--output", "features.txt"], "features.txt is not a .parquet or .npy file"),
    "a place that can't be": (["--output", "model/config.json/x.npy"], "can't be written"),
    "no such pooling": (["--pooling", "max"], "--pooling 'max' is not one of mean, cls, both, patches"),
    "no such split": (["--split", "nothing"], "choose one of: train"),
    "no images": (["--max_samples", "0"], "max_samples 0 is too small"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_can_not_be_embedded_gets_one_line(case, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words, message = MISTAKES[case]
    embed(folder, "features.npy", *words, code=2)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert lines[-1].startswith("hf-mae: error: ")
    assert message in lines[-1]


@pytest.mark.slow
def test_several_processes_are_refused(folder, tmp_path):
    output = tmp_path / "features.npy"
    words = ["-m", "hf_mae.cli", "embed", "--model", folder, "--dataset", "digits", "--output", output]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    ended = subprocess.run(launch, env=environment(ACCELERATE_USE_CPU="true"), capture_output=True, text=True)
    assert ended.returncode != 0
    assert "2 processes would write one file; start only one process" in ended.stderr
    assert not output.exists()
