"""The two lines that a command prints before it starts to work, and the warnings beside them."""

import numpy as np
import pytest
from image_sets import image_table, samples, write_tar
from memory_source import MemorySource
from PIL import Image
from runs import arguments, start
from tiny import save_model

from hf_mae.data.order import Rows
from hf_mae.data.stats import probe_rows
from hf_mae.data.transform import ImageSpec
from hf_mae.data.understood import announce_data

HELD_OUT = "5% of train, held out by a hash of each row's place"
PIXELS = "1 channel of 8 bits (uint8), 6 x 9 pixels, used at 8 x 8"


def draw(path, size=(6, 9), dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, size).astype(dtype)).save(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def said(capsys, caplog):
    """The two lines that a dry run of pretraining prints, and its warnings."""

    def dry_run(**keys):
        capsys.readouterr()
        caplog.clear()
        assert start(*arguments("out", dry_run=True, **keys)) == 0
        return capsys.readouterr().out.splitlines()[:2], [record.getMessage() for record in caplog.records]

    return dry_run


def test_split_folders_and_class_folders(here, said):
    for split, count in (("train", 4), ("test", 3)):
        for number in range(count):
            draw(here / "data" / split / ("cat" if number % 2 else "dog") / f"{number}.png")
    used = "4 images of split train, evaluated on 3 images: split test"
    line = f"data     data (splits from folder names): {used}; labels: 2 classes from class folders"
    assert said(dataset="data", total_batch_size=4) == ([line, f"images   {PIXELS}"], [])


def test_one_split_with_a_table_of_labels_beside_the_images(here, said):
    for number in range(8):
        draw(here / "data" / f"{number}.png")
    rows = "".join(f"{number}.png,{'abc'[number % 3]}\n" for number in range(8))
    (here / "data" / "metadata.csv").write_text(f"file_name,kind\n{rows}")
    line = f"data     data (only one split): 7 images of split train, evaluated on 1 image: {HELD_OUT}; "
    labels = "labels: 3 different values from metadata.csv, column kind"
    assert said(dataset="data", total_batch_size=4) == ([line + labels, f"images   {PIXELS}"], [])


def test_a_table_of_labels_that_lies_elsewhere(here, said):
    for number in range(8):
        draw(here / "data" / f"{number}.png")
    (here / "list.csv").write_text("image,a,b\n" + "".join(f"{number},1,{number % 2}\n" for number in range(8)))
    lines, warnings = said(dataset="data", labels="list.csv", label_column="a,b", total_batch_size=4)
    assert lines[0].endswith("; labels: 2 classes from list.csv, column a, b")
    assert warnings == []


def test_parquet_files_with_named_classes(here, said, own_caches):
    (here / "data").mkdir()
    for split, numbers in (("train", range(6)), ("test", range(4))):
        image_table(numbers).to_parquet(here / "data" / f"{split}-00000-of-00001.parquet")
    used = "6 images of split train, evaluated on 4 images: split test"
    lines, warnings = said(dataset="data", total_batch_size=6)
    assert lines == [
        f"data     data (splits from file names): {used}; labels: 3 classes from column label",
        "images   3 channels of 8 bits (uint8), 4 x 4 pixels, used at 8 x 8",
    ]
    assert warnings == []


def test_a_folder_written_by_save_to_disk_and_another_data_set_to_evaluate_on(here, said):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": image_table(range(6)), "extra": image_table(range(3))}).save_to_disk(here / "d")
    used = "6 images of split train, evaluated on 92 images: split train of digits"
    lines, _ = said(dataset="d", eval_dataset="digits", max_eval_samples=92, num_channels=1, total_batch_size=6)
    assert lines == [
        f"data     d (splits from dataset_dict.json): {used}; labels: 3 classes from column label",
        "images   3 channels of 8 bits (uint8), 4 x 4 pixels, used at 8 x 8, as 1 channel of 8 bits (uint8)",
    ]


def test_tars(here, said):
    write_tar(here / "a.tar", samples(range(8)))
    lines, _ = said(dataset="a.tar", total_batch_size=4)
    assert lines[0].endswith("(only one split): 7 images of split train, evaluated on 1 image: "
                             f"{HELD_OUT}; labels: from .cls members")  # fmt: skip
    write_tar(here / "b.tar", samples(range(8), label=lambda i: ("json", b'{"label": 1}')))
    assert said(dataset="b.tar", total_batch_size=4)[0][0].endswith("; labels: from key label of .json members")
    write_tar(here / "c.tar", samples(range(8), label=lambda i: ("json", b'{"caption": ""}')))
    assert said(dataset="c.tar", total_batch_size=4)[0][0].endswith("; labels: none")


def test_deep_pictures_of_several_sizes_without_labels(here, said):
    for number in range(8):
        draw(here / "data" / f"{number}.tif", (30 + 2 * number, 40), np.uint16)
    lines, warnings = said(dataset="data", total_batch_size=4)
    used = f"7 images of split train, evaluated on 1 image: {HELD_OUT}"
    assert lines == [
        f"data     data (only one split): {used}; labels: none",
        "images   1 channel of 16 bits (uint16), about 36 x 40 pixels, used at 8 x 8",
    ]
    assert warnings == []


def test_digits_with_the_quickstart_recipe(said):
    used = f"1,705 images of split train, evaluated on 92 images: {HELD_OUT}"
    lines = [
        f"data     digits (only one split): {used}; labels: 10 classes from scikit-learn",
        "images   1 channel of 8 bits (uint8), 8 x 8 pixels, used at 8 x 8",
    ]
    assert said(recipe="quickstart", quality_steps=None) == (lines, [])


@pytest.mark.parametrize("command", ["knn", "linear-probe", "embed"])
def test_every_command_on_frozen_features_says_it(here, command, capsys, caplog):
    folder = save_model(here / "model")
    words = ["embed", "--output", "f.npy"] if command == "embed" else ["evaluate", command, "--max_eval_samples", 20]
    assert start(*words, "--model", folder, "--dataset", "digits", "--max_samples", 40, "--num_workers", 0) == 0
    used = "" if command == "embed" else f", evaluated on 20 images: {HELD_OUT}"
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"data     digits (only one split): 40 images of split train{used}; labels: 10 classes from scikit-learn",
        "images   1 channel of 8 bits (uint8), 8 x 8 pixels, used at 8 x 8",
    ]
    assert caplog.records == []


def test_an_upright_size_is_found_without_decoding():
    source = MemorySource([[np.zeros((3, 20, 30), np.uint8), np.zeros((20, 30), np.uint8)]])
    assert probe_rows(Rows(source), 3).sizes.tolist() == [[20, 30], [20, 30]]


# ------------------------------------------------------------------------------------------ warnings

SPEC = ImageSpec((224, 224), 1, "uint8", 4)


def enlarged(edge, capsys, caplog, spec=SPEC) -> list[str]:
    rows = Rows(MemorySource([[np.zeros((edge, 2 * edge), np.uint8)] * 3]))
    announce_data(probe_rows(rows), spec, rows)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(("edge", "times"), [(127, "2.0"), (128, None), (16, "16.0"), (300, None)])
def test_images_that_are_enlarged_more_than_twice_are_named(edge, times, capsys, caplog):
    line = f"memory: images are enlarged {times} times, from {edge} pixels of their shorter side to 256; a model with"
    assert [message.startswith(line) for message in enlarged(edge, capsys, caplog)] == [True] * bool(times)


def test_a_view_that_is_not_square_is_measured_by_its_shorter_side(capsys, caplog):
    spec = ImageSpec((32, 64), 1, "uint8", 4, eval_resize=(36, 73))
    assert enlarged(18, capsys, caplog, spec) == []
    assert len(enlarged(17, capsys, caplog, spec)) == 1


def test_a_batch_larger_than_the_training_set_is_named(here, said):
    for number in range(8):
        draw(here / "data" / "ab"[number % 2] / f"{number}.png")
    line = (
        "a step takes {} images, but there are only 7 to train on: it repeats each of them {} times on average; "
        "pass --total_batch_size {} or less"
    )
    assert said(dataset="data", total_batch_size=14)[1] == [line.format(14, "2.0", 7)]
    assert said(dataset="data", total_batch_size=7)[1] == []
    assert said(dataset="data", total_batch_size=20, masks_per_image=2)[1] == [line.format(10, "1.4", 14)]
    assert said(dataset="data", total_batch_size=14, masks_per_image=2)[1] == []


def test_missing_labels_are_named_only_where_they_would_be_used(here, said):
    for number in range(8):
        draw(here / "data" / f"{number}.png")
    line = (
        "split train of data: none of 7 images has a label, so knn_top1 and linear_top1 are not measured; sort images "
        "into one folder per class, name the column with --label_column, or choose a split that has labels"
    )
    assert said(dataset="data", total_batch_size=4, quality_steps=1)[1] == [line]
    assert said(dataset="data", total_batch_size=4, quality_steps=0)[1] == []
    (here / "data" / "metadata.csv").write_text("file_name,label\n" + "".join(f"{i}.png,\n" for i in range(8)))
    line = line.partition("; ")[0] + "; write them into metadata.csv"
    assert said(dataset="data", total_batch_size=4, quality_steps=1)[1] == [line]
