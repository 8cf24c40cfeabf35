"""Names of files that aren't UTF-8, or have line ends: keys and labels are plain text on one line."""

import csv
import os

import pyarrow.parquet as pq
import pytest

pytest.importorskip("datasets")
from image_sets import png, write_tar
from runs import run, start

from hf_mae.data.sources import open_source
from hf_mae.files import plain_name


def test_a_plain_name_is_one_line_of_text():
    assert plain_name("a\udcff\nb\x1b[0m\x85\u2028é 中.png") == "a\\udcff\\nb\\x1b[0m\\x85\\u2028é 中.png"


def test_keys_and_class_names_are_text_whatever_the_bytes_of_file_names(tmp_path):
    for folder in (b"c\xff", b"d\n"):
        os.makedirs(os.fsencode(tmp_path) + b"/i/" + folder)
        with open(os.fsencode(tmp_path) + b"/i/" + folder + b"/a\xfe.png", "wb") as file:
            file.write(png(1))
    source = open_source(str(tmp_path / "i"))
    assert [row.key for row in source.read(0, [0, 1])] == ["c\\udcff/a\\udcfe.png", "d\\n/a\\udcfe.png"]
    assert source.label_names == ["c\\udcff", "d\\n"]


def test_a_tar_and_its_members_may_have_names_that_are_not_text(tmp_path):
    name = os.fsdecode(b"t\xff.tar")
    write_tar(
        tmp_path / name, [(os.fsdecode(b"m\xff.png"), png(1)), (os.fsdecode(b"m\xff.json"), b'{"label": "\\udcff"}')]
    )
    (row,) = open_source(str(tmp_path / name)).read(0, [0])
    assert (row.key, row.image, row.label) == ("t\\udcff.tar#0", png(1), "\\udcff")


def test_every_command_reads_and_names_files_whose_names_are_not_text(tmp_path, capsys):
    classes = [b"a\xff", b"b\n"]
    for number, folder in enumerate(classes * 20):
        path = os.fsencode(tmp_path) + b"/images/" + folder
        os.makedirs(path, exist_ok=True)
        with open(path + b"/%d\xfe.png" % number, "wb") as file:
            file.write(b"broken" if number == 7 else png(number))
    images = tmp_path / "images"
    model = run(tmp_path / "model", dataset=images, num_channels=3, total_steps=2, max_bad_fraction=0.2)
    bad = (model / "bad_samples.jsonl").read_text()
    assert bad.count("\n") == 1
    assert '"b\\\\n/7\\\\udcfe.png"' in bad
    common = ("--dataset", images, "--num_workers", 0, "--max_bad_fraction", 0.2)
    for command in (
        ("evaluate", "knn", "--model", model, *common),
        ("embed", "--model", model, *common, "--output", tmp_path / "features.parquet"),
        ("embed", "--model", model, *common, "--output", tmp_path / "features.npy"),
        ("finetune", "--model", model, *common[:4], "--output_dir", tmp_path / "tuned", "--total_steps", 2,
         "--total_batch_size", 8, "--predictions", tmp_path / "said.csv"),
        ("predict", "--model", tmp_path / "tuned", *common, "--output", tmp_path / "new.csv"),
        ("inspect", images), ("report", tmp_path / "tuned"), ("card", tmp_path / "tuned", tmp_path / "card.md"),
    ):  # fmt: skip
        assert start(*command) == 0, capsys.readouterr().err
    features = pq.read_table(tmp_path / "features.parquet").to_pydict()
    assert set(features["label"]) == {"a\\udcff", "b\\n"}
    for file in ("features.csv", "new.csv"):
        keys = [row["key"] for row in csv.DictReader((tmp_path / file).open())]
        assert keys == features["key"]
        assert len(keys) == 39
    with (tmp_path / "said.csv").open() as file:
        assert {row["label"] for row in csv.DictReader(file)} <= {"a\\udcff", "b\\n"}
    assert "b\\n/7\\udcfe.png" in capsys.readouterr().out
