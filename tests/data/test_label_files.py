"""Labels from tables: `metadata.csv` beside images, and lists that lie elsewhere."""

import json

import pytest

pytest.importorskip("datasets")
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from image_sets import png, upload, write_files

from hf_mae.data.labels import find_labels, labels_of, named
from hf_mae.data.order import Rows
from hf_mae.data.prepare import prepare
from hf_mae.data.sources import open_source, open_splits
from hf_mae.errors import DataError
from hf_mae.keys.data_keys import PrepareRecipe, SplitKeys

pytestmark = pytest.mark.usefixtures("own_caches")

SINGLE, MULTI = "single_label_classification", "multi_label_classification"
IMAGES = ("000/a.png", "000/b.png", "001/c.png", "001/d.png")
SHEET = {"000/a.png": "cat", "000/b.png": "dog", "001/c.png": "emu", "001/d.png": "cat"}


def folder(path, *names, **texts):
    """A folder of images, and of texts: `metadata_csv="..."` is the content of metadata.csv."""
    files = {name: png(i) for i, name in enumerate(names or IMAGES)}
    files |= {name.replace("_", "."): text.encode() for name, text in texts.items()}
    return write_files(path, files)


def labels(path, **keys):
    """Key -> label of the rows of a split, with the names of classes."""
    source = open_source(str(path), **keys)
    rows = Rows(source)
    found = {row.key: named(row.label, source) for row in rows.read(rows.index)}
    assert [named(label, source) for label in labels_of(rows)] == list(found.values())
    return found


def csv_of(sheet, header="file_name,label"):
    return "\n".join([header, *(f"{name},{label}" for name, label in sheet.items())]) + "\n"


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_mae")]


# ------------------------------------------------------------------------------------------ metadata.csv


def write_metadata(path, kind, sheet):
    rows = [{"file_name": name, "label": label} for name, label in sheet.items()]
    if kind == "csv":
        (path / "metadata.csv").write_text(csv_of(sheet))
    elif kind == "jsonl":
        (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path / "metadata.parquet")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_metadata_file_wins_over_class_folders(tmp_path, kind, caplog):
    path = folder(tmp_path / "m")
    write_metadata(path, kind, SHEET)
    assert labels(path) == SHEET
    assert find_labels(Rows(open_source(str(path))), SINGLE).names == ("cat", "dog", "emu")
    line = f"labels are from metadata.{kind}, column label, not from folders: 4 of 4 images of split train have a label"
    assert warnings(caplog)[0] == f"{path}: {line}"


def test_labels_are_those_that_datasets_reads(tmp_path):
    path = folder(tmp_path / "m", metadata_csv=csv_of(SHEET))
    table = datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
    names = [row["image"].filename.removeprefix(f"{path}/") for row in table]
    assert dict(zip(names, table["label"], strict=True)) == labels(path)


def test_each_split_folder_may_have_its_own_metadata_file(tmp_path, caplog):
    path = folder(tmp_path / "m", "train/a.png", "train/x/b.png", "test/a.png")
    (path / "train" / "metadata.csv").write_text("file_name,label\na.png,cat\nx/b.png,dog\n")
    (path / "test" / "metadata.csv").write_text("file_name,label\na.png,dog\n")
    assert labels(path) == {"train/a.png": "cat", "train/x/b.png": "dog"}
    assert labels(path, split="test") == {"test/a.png": "dog"}
    assert "from test/metadata.csv and 1 more" in warnings(caplog)[0]


def test_a_metadata_file_above_the_split_folders_has_all_their_labels(tmp_path):
    path = folder(tmp_path / "m", "data/train/a.png", "data/train/b.png", "data/test/a.png")
    (path / "data" / "metadata.csv").write_text("file_name,label\ntrain/a.png,1\ntrain/b.png,2\ntest/a.png,2\n")
    assert labels(path) == {"data/train/a.png": 1, "data/train/b.png": 2}
    assert labels(path, split="test") == {"data/test/a.png": 2}


def test_the_nearest_metadata_file_counts(tmp_path):
    path = folder(tmp_path / "m", metadata_csv=csv_of(SHEET))
    (path / "001" / "metadata.csv").write_text("file_name,label\nc.png,fox\n")
    assert labels(path) == {**SHEET, "001/c.png": "fox"}


def test_a_metadata_file_of_a_remote_folder_is_read(tmp_path):
    url = upload(folder(tmp_path / "m", metadata_csv=csv_of(SHEET)))
    assert labels(url) == SHEET


def test_images_without_a_row_and_rows_without_an_image_are_counted(tmp_path, caplog):
    sheet = {"000/a.png": "cat", "001/d.png": "dog", "001/x.png": "cat"}
    path = folder(tmp_path / "m", metadata_csv=csv_of(sheet))
    assert labels(path) == {"000/a.png": "cat", "000/b.png": None, "001/c.png": None, "001/d.png": "dog"}
    line = "2 of 4 images of split train have a label (the first without one is 000/b.png); 1 row names no image"
    assert line in warnings(caplog)[0]
    keys = SplitKeys(dataset=str(path), eval_dataset=str(path))
    assert len(open_splits(keys)[0]) == 4
    assert [len(rows) for rows in open_splits(keys, labelled=True)[:2]] == [2, 2]


def test_several_label_columns_are_asked_for(tmp_path, caplog):
    path = folder(tmp_path / "m", "a.png", "b.png", metadata_csv="file_name,site,finding\na.png,x,cyst\nb.png,y,mass\n")
    assert set(labels(path).values()) == {None}
    assert "several columns that may be labels: choose one or more with --label_column: site,finding" in caplog.text
    with pytest.raises(DataError, match=r"2 of 2 images .* choose one or more with --label_column: site,finding"):
        find_labels(Rows(open_source(str(path))), SINGLE)
    assert labels(path, label_column="finding") == {"a.png": "cyst", "b.png": "mass"}
    with pytest.raises(DataError, match="no column 'findings' for --label_column; did you mean 'finding'"):
        open_source(str(path), label_column="findings")


def test_a_metadata_file_without_labels_leaves_the_class_folders(tmp_path, caplog):
    names = dict.fromkeys(SHEET)
    path = folder(tmp_path / "m", metadata_csv="\n".join(["file_name", *names]))
    assert labels(path) == {name: name[:3] for name in IMAGES}
    other = folder(tmp_path / "n", metadata_csv="key,value\nauthor,me\n")
    assert labels(other) == {name: name[:3] for name in IMAGES}
    assert "metadata.csv has no column file_name, and is not read" in caplog.text


def test_named_classes_of_a_metadata_parquet_keep_their_names(tmp_path):
    path = folder(tmp_path / "m", "a.png", "b.png")
    features = {"file_name": datasets.Value("string"), "label": datasets.ClassLabel(names=["emu", "cat", "dog"])}
    table = datasets.Dataset.from_dict(
        {"file_name": ["a.png", "b.png"], "label": [1, 2]}, features=datasets.Features(features)
    )
    table.to_parquet(str(path / "metadata.parquet"))
    assert labels(path) == {"a.png": "cat", "b.png": "dog"}
    assert find_labels(Rows(open_source(str(path))), SINGLE).names == ("emu", "cat", "dog")


def test_prepare_writes_the_labels_of_the_metadata_file(tmp_path):
    path = folder(tmp_path / "m", metadata_csv=csv_of(SHEET))
    prepare(PrepareRecipe(dataset=str(path), output_dir=str(tmp_path / "out"), num_workers=0))
    source = open_source(str(tmp_path / "out"))
    assert labels_of(Rows(source)) == list(SHEET.values())


def test_a_changed_label_changes_the_fingerprint(tmp_path):
    path = folder(tmp_path / "m", metadata_csv=csv_of(SHEET))
    before = open_source(str(path)).fingerprint
    assert open_source(str(path)).fingerprint == before
    (path / "metadata.csv").write_text(csv_of({**SHEET, "000/a.png": "dog"}))
    assert open_source(str(path)).fingerprint != before
    plain = folder(tmp_path / "plain")
    assert "labels" not in open_source(str(plain)).fingerprint
