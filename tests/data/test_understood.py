"""The two lines that a command prints before it starts to work, and the warnings beside them."""

import io

import numpy as np
import pytest
from image_sets import image_table, samples, write_tar
from memory_source import MemorySource
from PIL import ExifTags, Image
from runs import arguments, start
from tiny import save_model, tiny_config

from hf_mae import MAEForImageClassification
from hf_mae.data.order import Rows
from hf_mae.data.stats import probe_rows
from hf_mae.data.transform import ImageSpec
from hf_mae.data.understood import announce_data, describe_images

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
    labels = "labels: 3 classes from metadata.csv, column kind"
    assert said(dataset="data", total_batch_size=4) == ([line + labels, f"images   {PIXELS}"], [])


def test_a_table_of_labels_that_lies_elsewhere(here, said):
    for number in range(8):
        draw(here / "data" / f"{number}.png")
    (here / "list.csv").write_text("image,a,b\n" + "".join(f"{number},1,{number % 2}\n" for number in range(8)))
    lines, warnings = said(dataset="data", labels="list.csv", label_column="a,b", total_batch_size=4)
    assert lines[0].endswith("; labels: 2 classes from list.csv, column a, b")
    assert warnings == []
    lines, _ = said(dataset="data", labels="list.csv", label_column="b", total_batch_size=4)
    assert lines[0].endswith("; labels: 2 different values from list.csv, column b")


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


def test_a_fine_tuned_model_names_only_the_images_that_it_is_scored_on(here, capsys):
    folder = save_model(here / "model")
    config = tiny_config(image_size=8, patch_size=4, num_channels=1, id2label={i: str(i) for i in range(10)})
    MAEForImageClassification(config).save_pretrained(folder)
    assert start("evaluate", "classification", "--model", folder, "--dataset", "digits", "--num_workers", 0) == 0
    part = HELD_OUT.replace("train", "each class of train")
    line = f"data     digits (only one split): evaluated on 90 images: {part}; labels: 10 classes from scikit-learn"
    assert capsys.readouterr().out.splitlines()[0] == line


def test_fine_tuning_names_the_classes_that_it_learns(here, capsys):
    for number in range(8):
        draw(here / "data" / f"{number}.png", (8, 8))
    (here / "data" / "metadata.csv").write_text("file_name,a,b\n" + "".join(f"{i}.png,{i / 9},2\n" for i in range(8)))
    data = ["--dataset", "data", "--eval_dataset", "data", "--label_column", "a,b", "--problem_type", "regression"]
    words = ["--model", save_model(here / "model"), "--total_batch_size", 8, "--num_workers", 0, "--dry_run"]
    assert start("finetune", *words, *data) == 0
    used = "8 images of split train, evaluated on 8 images: split train"
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"data     data (only one split): {used}; labels: 2 numbers per image from metadata.csv, column a, b",
        "images   1 channel of 8 bits (uint8), 8 x 8 pixels, used at 8 x 8",
    ]


def test_splits_that_a_readme_lists(here, said, own_caches):
    for name, numbers in (("x", range(6)), ("y", range(4))):
        (here / "data").mkdir(exist_ok=True)
        image_table(numbers).to_parquet(here / "data" / f"{name}.parquet")
    files = "- {split: train, path: x.parquet}\n  - {split: test, path: y.parquet}\n"
    (here / "data" / "README.md").write_text(f"---\nconfigs:\n- config_name: all\n  data_files:\n  {files}---\n")
    assert said(dataset="data", total_batch_size=6)[0][0].startswith(
        "data     data (splits from its own description): 6"
    )


def test_prepare_says_it_for_all_splits(here, capsys, own_caches):
    for name in ("train/cat/1.png", "train/dog/2.png", "val/dog/3.png"):
        draw(here / "data" / name)
    assert start("prepare", "data", "out", "--num_workers", 0) == 0
    used = "2 images of split train, 1 image of split validation"
    line = f"data     data (splits from folder names): {used}; labels: 2 classes from class folders"
    assert capsys.readouterr().out.splitlines()[0] == line


def test_sizes_are_those_of_upright_images():
    photo, exif, stream = Image.new("RGB", (40, 30)), Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    photo.save(stream, "JPEG", exif=exif)
    images = [stream.getvalue(), np.zeros((3, 20, 30), np.uint8), np.zeros((20, 30), np.uint8)]
    probe = probe_rows(Rows(MemorySource([images])), 3)
    assert probe.sizes.tolist() == [[40, 30], [20, 30], [20, 30]]


def test_channels_are_those_of_the_images_and_those_that_the_model_gets():
    images = [np.zeros((4, 4, channels), np.uint16) for channels in (1, 3)]
    probe = probe_rows(Rows(MemorySource([images])), 3)
    shown = "1 or 3 channels of 16 bits (uint16), 4 x 4 pixels, used at 8 x 9, as 3 channels of 8 bits (uint8)"
    assert describe_images(probe, ImageSpec((8, 9), 3, "uint8", 4)) == shown


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
        "a step of {} images is larger than the training set of 7: it repeats each of them {} times on average; "
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
