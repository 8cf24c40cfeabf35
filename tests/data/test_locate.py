from unittest import mock

import fsspec
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("datasets")
import datasets

from hf_mae.cli import main
from hf_mae.data import locate as locate_module
from hf_mae.data.locate import locate
from hf_mae.data.sources import open_splits
from hf_mae.errors import DataError, SourceUnavailable
from hf_mae.keys.data_keys import DataKeys, SplitKeys

pytestmark = pytest.mark.usefixtures("own_caches")

IMAGES = 40  # of a split; enough for a held-out part


def image_folder(folder, splits=("train", "val")):
    for split in splits:
        for number in range(IMAGES):
            path = folder / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4), number, np.uint8)).save(path)
    return folder


def parquet_folder(folder):
    folder.mkdir()
    for split in ("train", "validation"):
        images = [{"bytes": (image_folder(folder.parent / "images") / "train/a/0.png").read_bytes()}] * 4
        table = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def counts(monkeypatch):
    """How often a folder is walked, and how often `datasets` makes a builder."""
    walk = mock.Mock(wraps=locate_module.list_folder)
    builder = mock.Mock(wraps=datasets.load_dataset_builder)
    monkeypatch.setattr(locate_module, "list_folder", walk)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    return lambda: (walk.call_count, builder.call_count)


@pytest.mark.parametrize("splits", [("train", "val"), ("a", "b")])
def test_an_image_folder_is_walked_once_for_both_splits(tmp_path, counts, splits):
    rows, eval_rows, _ = open_splits(SplitKeys(dataset=str(image_folder(tmp_path / "d", splits))))
    assert len(rows) + len(eval_rows) == 2 * IMAGES
    assert counts() == (1, 0)


def test_a_command_walks_an_image_folder_once(tmp_path, counts):
    data, out = image_folder(tmp_path / "d"), tmp_path / "out"
    words = ["--recipe", "quickstart", "--dataset", str(data), "--output_dir", str(out), "--dry_run", "true"]
    assert main(["pretrain", *words]) == 0
    assert counts() == (1, 0)


@pytest.mark.parametrize("streaming", [None, True])
def test_a_folder_of_parquet_takes_one_walk_and_one_builder(tmp_path, counts, streaming):
    keys = SplitKeys(dataset=str(parquet_folder(tmp_path / "d")))
    rows, eval_rows, evaluated_on = open_splits(keys, streaming)
    assert (len(rows), len(eval_rows)) == (4, 4)
    assert evaluated_on.startswith("split validation of ")
    assert counts() == (1, 1)


@pytest.mark.parametrize("kind", [image_folder, parquet_folder])
def test_a_url_is_listed_once_for_both_splits(tmp_path, monkeypatch, kind):
    memory = fsspec.filesystem("memory")
    memory.put(str(kind(tmp_path / "d")), "/bucket", recursive=True)
    find = mock.Mock(wraps=memory.find)
    monkeypatch.setattr(type(memory), "find", find)
    keys = SplitKeys(dataset="memory://bucket")
    locate(keys)
    once = find.call_count
    rows, eval_rows, _ = open_splits(keys)
    assert len(rows) == len(eval_rows) > 0
    assert find.call_count == 2 * once
    if kind is image_folder:
        assert once == 1


def test_another_data_set_to_evaluate_on_is_located_once_too(tmp_path, counts):
    keys = SplitKeys(
        dataset=str(image_folder(tmp_path / "d")), eval_dataset=str(image_folder(tmp_path / "e")), eval_split="val"
    )
    _, eval_rows, evaluated_on = open_splits(keys)
    assert evaluated_on == f"split validation of {tmp_path / 'e'}"
    assert len(eval_rows) == IMAGES
    assert counts() == (2, 0)


def test_a_folder_opened_as_a_split_does_not_change_the_classes_of_another(tmp_path):
    folder = image_folder(tmp_path / "d", ("one", "two"))
    for name in ("one/a", "one/b"):
        (folder / name).rename(folder / f"{name}_of_one")
    keys = SplitKeys(dataset=str(folder), split="one", eval_split="two")
    rows, eval_rows, _ = open_splits(keys)
    assert rows.source.label_names == ["a_of_one", "b_of_one"]
    assert eval_rows.source.label_names == ["a", "b"]


def test_a_place_keeps_what_the_user_typed_of_its_columns(tmp_path):
    place = locate(DataKeys(dataset=str(image_folder(tmp_path / "d")), label_column="class"))
    assert (place.label_column, place.image_column) == ("class", None)
    with pytest.raises(DataError, match="its labels are its class folders, not 'class'"):
        open_splits(SplitKeys(dataset=str(tmp_path / "d"), label_column="class"))


def test_a_mistyped_path_is_answered_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locate_module, "_locate_on_hub", mock.Mock(side_effect=AssertionError))
    (tmp_path / "images" / "train").mkdir(parents=True)
    for name, hint in {
        "images/trian": "; did you mean 'images/train'?",
        "digit.npy": "; check the path",
        "a/b/c": "; check the path",
    }.items():
        with pytest.raises(DataError) as caught:
            locate(DataKeys(dataset=name))
        assert str(caught.value) == f"there is no file or folder {name}{hint}"


def test_without_a_network_the_message_says_that_there_is_no_local_folder_either(monkeypatch):
    monkeypatch.setattr(locate_module, "_locate_on_hub", mock.Mock(side_effect=SourceUnavailable("no network")))
    with pytest.raises(SourceUnavailable, match=r"^no network; no local file or folder is called user/name either$"):
        locate(DataKeys(dataset="user/name"))


def test_twenty_images_are_enough_to_hold_one_out(tmp_path):
    for number in range(20):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(tmp_path / f"{number:02d}.png")
    rows, eval_rows, _ = open_splits(SplitKeys(dataset=str(tmp_path)))
    assert len(rows) + len(eval_rows) == 20
    assert len(eval_rows) >= 1
    assert not set(rows.index) & set(eval_rows.index)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot read .*: Expecting value"),
        ("[" * 100_000, "cannot read .* nested too deeply"),
        ("[1]", "does not list the splits"),
        ('"train"', "does not list the splits"),
        ("{}", "does not list the splits"),
        ('{"splits": "train"}', "does not list the splits"),
        ('{"splits": [1]}', "does not list the splits"),
        ('{"splits": []}', "does not list the splits"),
    ],
)
def test_a_list_of_saved_splits_that_cannot_be_used_is_one_line(tmp_path, content, said):
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises(DataError, match=rf"^[^\n]*{said}[^\n]*; save the data set again$") as caught:
        locate(DataKeys(dataset=str(tmp_path)))
    assert "dataset_dict.json" in str(caught.value)


@pytest.mark.parametrize("header", ["a: [", "- a", "configs: 3"])
def test_a_readme_that_datasets_cannot_read_is_one_line(tmp_path, header):
    folder = parquet_folder(tmp_path / "data")
    (folder / "README.md").write_text(f"---\n{header}\n---\n")
    with pytest.raises(DataError, match=rf"^{folder}: [^\n]*; [^\n]*$"):
        locate(DataKeys(dataset=str(folder)))


def test_a_fraction_to_hold_out_wins_over_the_data_sets_own_evaluation_split(tmp_path):
    folder = str(image_folder(tmp_path / "d", ("train", "val")))
    assert open_splits(SplitKeys(dataset=folder))[2] == f"split validation of {folder}"
    rows, eval_rows, evaluated_on = open_splits(SplitKeys(dataset=folder, eval_fraction=0.5))
    assert rows.source is eval_rows.source
    assert sorted([*rows.index, *eval_rows.index]) == list(range(IMAGES))
    assert evaluated_on == "50% of train, held out by a hash of each row's place"
