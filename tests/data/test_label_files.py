"""Labels from tables: `metadata.csv` beside images, and lists that lie elsewhere."""

import json

import pytest

pytest.importorskip("datasets")
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from image_sets import png, upload, write_files, write_parquet

from hf_mae.data import label_files
from hf_mae.data.builders import from_builder, load_builder
from hf_mae.data.labels import find_labels, labels_of, named
from hf_mae.data.locate import locate
from hf_mae.data.order import Rows
from hf_mae.data.prepare import prepare
from hf_mae.data.sources import open_source, open_split, open_splits
from hf_mae.data.tables import Table
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
    assert open_source(str(path)).labels_from == f"metadata.{kind}, column label"
    assert warnings(caplog) == []


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
    assert open_source(str(path)).labels_from == "train/metadata.csv, column label"
    assert warnings(caplog) == []


def test_a_metadata_file_above_the_split_folders_has_all_their_labels(tmp_path):
    path = folder(tmp_path / "m", "data/train/a.png", "data/train/b.png", "data/test/a.png")
    (path / "data" / "metadata.csv").write_text("file_name,label\ntrain/a.png,1\ntrain/b.png,2\ntest/a.png,2\n")
    assert labels(path) == {"data/train/a.png": 1, "data/train/b.png": 2}
    assert labels(path, split="test") == {"data/test/a.png": 2}


def test_the_nearest_metadata_file_counts(tmp_path):
    path = folder(tmp_path / "m", metadata_csv=csv_of(SHEET))
    (path / "001" / "metadata.csv").write_text("file_name,label\nc.png,fox\n")
    assert labels(path) == {**SHEET, "001/c.png": "fox"}


def test_metadata_files_are_found_by_the_builder_of_datasets_too(tmp_path):
    path = folder(tmp_path / "m", "train/a.png", "train/b.png", "test/a.png")
    for split, text in (("train", "a.png,cat\nb.png,dog\n"), ("test", "a.png,dog\n")):
        (path / split / "metadata.csv").write_text(f"file_name,label\n{text}")
    place = from_builder("m", load_builder("m", str(path)))
    for split, expected in (("train", ["cat", "dog"]), ("test", ["dog"])):
        assert labels_of(Rows(open_split(place, split))) == expected


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
    assert "it isn't clear which column of metadata.csv has them: choose one or more with --label_column" in caplog.text
    with pytest.raises(DataError, match=r"2 of 2 images .* choose one or more with --label_column: site,finding"):
        find_labels(open_splits(SplitKeys(dataset=str(path), eval_dataset=str(path)), labelled=True)[0], SINGLE)
    assert labels(path, label_column="finding") == {"a.png": "cyst", "b.png": "mass"}
    with pytest.raises(DataError, match="no column 'findings' for --label_column; did you mean 'finding'"):
        open_source(str(path), label_column="findings")


def test_the_only_other_column_has_labels_if_they_repeat(tmp_path, caplog):
    names = [f"{i}.png" for i in range(4)]
    for values, expected in (("xyxy", list("xyxy")), ("wxyz", [None] * 4)):
        text = "file_name,text\n" + "".join(f"{name},{value}\n" for name, value in zip(names, values, strict=True))
        path = folder(tmp_path / values, *names, metadata_csv=text)
        assert list(labels(path).values()) == expected
    assert "it isn't clear which column of metadata.csv has them: choose one or more with --label_column: text" in (
        caplog.text
    )


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


def test_prepare_keeps_labels_that_only_the_last_images_have(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mae.data.prepare.TYPE_ROWS", 1)
    path = folder(tmp_path / "m", metadata_csv=csv_of({"001/d.png": "cat"}))
    prepare(PrepareRecipe(dataset=str(path), output_dir=str(tmp_path / "out"), num_workers=0))
    assert labels_of(Rows(open_source(str(tmp_path / "out")))) == [None, None, None, "cat"]


def test_a_changed_label_changes_the_fingerprint(tmp_path):
    path = folder(tmp_path / "m", metadata_csv=csv_of(SHEET))
    before = open_source(str(path)).fingerprint
    assert open_source(str(path)).fingerprint == before
    (path / "metadata.csv").write_text(csv_of({**SHEET, "000/a.png": "dog"}))
    assert open_source(str(path)).fingerprint != before
    plain = folder(tmp_path / "plain")
    assert "labels" not in open_source(str(plain)).fingerprint


# ------------------------------------------------------------------------------------------ --labels


def listed(tmp_path, text, *names, suffix="csv", **keys):
    """Labels of a folder of images, by a list that lies elsewhere."""
    path = folder(tmp_path / "images", *(names or ("a.png", "b.png", "c.png")))
    (tmp_path / f"list.{suffix}").write_bytes(text if isinstance(text, bytes) else text.encode())
    return labels(path, labels=str(tmp_path / f"list.{suffix}"), **keys)


@pytest.mark.parametrize(
    "values",
    [
        ["a.png", "b.png", "c.png"],
        ["a", "b", "c"],
        ["a.dcm", "b.dcm", "c.dcm"],  # converted since
        ["/old/place/a.png", "/old/place/b.png", "/old/place/c.png"],
        ["C:\\old\\a.png", "C:\\old\\b.png", "C:\\old\\c.png"],
        ["./a.png", "./b.png", "./c.png"],
    ],
)
def test_the_column_of_file_names_is_found_by_looking(tmp_path, values, caplog):
    rows = zip(["1", "2", "3"], values, ["cat", "dog", "cat"], strict=True)
    text = "number,photo,label\n" + "".join(",".join(row) + "\n" for row in rows)
    assert listed(tmp_path, text) == {"a.png": "cat", "b.png": "dog", "c.png": "cat"}
    assert warnings(caplog) == []  # each of them is found


def test_paths_win_over_names_that_several_images_have(tmp_path):
    names = ("x/a.png", "y/a.png")
    assert listed(tmp_path / "1", "file,label\nx/a.png,1\ny/a.png,2\n", *names) == {"x/a.png": 1, "y/a.png": 2}
    with pytest.raises(DataError, match=r"list.csv names a.png, which is several images; write paths below the folder"):
        listed(tmp_path / "2", "file,label\na.png,1\n", *names)


def test_names_match_in_any_unicode_form(tmp_path):
    text = "file,label\ncafe\u0301.png,1\nthe\u0301.png,2\n"
    assert listed(tmp_path, text, "caf\u00e9.png", "the\u0301.png") == {"caf\u00e9.png": 1, "the\u0301.png": 2}


def test_several_columns_of_file_names_are_named(tmp_path):
    text = "left,right,label\na.png,b.png,1\nb.png,a.png,2\n"
    message = "several columns of list.csv name images of .*: left, right; rename the right one to file_name"
    with pytest.raises(DataError, match=message):
        listed(tmp_path, text)
    renamed = text.replace("right", "file_name")
    assert listed(tmp_path / "2", renamed, label_column="label") == {"a.png": 2, "b.png": 1, "c.png": None}


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "0", "12"], [1, 0, 12]),
        (["1.0", "0", "2.5"], [1.0, 0.0, 2.5]),
        (["True", "false", "TRUE"], [True, False, True]),
        (["01", "1", "02"], ["01", "1", "02"]),  # names, not numbers
        (["1", "", "n/a"], [1, None, None]),
        (["cat", "none", "NA"], ["cat", "none", "NA"]),
        (["1e400", "1", "2"], ["1e400", "1", "2"]),
    ],
)
def test_cells_are_read_as_what_all_of_a_column_are(tmp_path, cells, expected):
    text = "file,label\n" + "".join(f"{name}.png,{cell}\n" for name, cell in zip("abc", cells, strict=True))
    found = list(listed(tmp_path, text).values())
    assert found == expected
    assert list(map(type, found)) == list(map(type, expected))


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        (b"file;label\r\na.png;cat\r\nb.png;dog, small\r\n\r\n", "csv"),  # as Excel writes it in many countries
        (b'file,label\na.png,cat\nb.png,"dog, small"\n', "csv"),
        (b"\xef\xbb\xbffile\tlabel\na.png\tcat\nb.png\tdog, small\n", "tsv"),
        ('file,label\na.png,cat\nb.png,"dog, small"\n'.encode("utf-16"), "csv"),
        (b'{"file": "a.png", "label": "cat"}\n{"file": "b.png", "label": "dog, small"}\n', "jsonl"),
    ],
)
def test_tables_of_every_dialect_are_read(tmp_path, text, suffix):
    assert listed(tmp_path, text, suffix=suffix) == {"a.png": "cat", "b.png": "dog, small", "c.png": None}


@pytest.mark.parametrize(
    ("text", "keys", "message"),
    [
        ("file,label\nx.png,1\n", {}, r"no column of list.csv \(file, label\) names images of .*: it has e.g. x.png"),
        ("a.png,1\nb.png,2\n", {}, "list.csv has the image a.png in place of a column's name; add a line of names"),
        ("file,p,q\na.png,1,0\n", {}, "has no single column of labels; choose one or more .*: p,q"),
        ("file,p,q\na.png,1,0\n", {"label_column": "p,r"}, "has no column 'r' for --label_column; its columns: p, q"),
        ("file,p,q\na.png,1,2,3\n", {}, "line 2 of list.csv has 4 fields, but the first has 3; put texts"),
        ("file,p,p\na.png,1,2\n", {}, "several columns of one name"),
        ("file,label\n", {}, "has no rows"),
        ("", {}, "has no rows"),
        (b"file,label\na.png,caf\xe9\n", {}, "is not UTF-8 text .*; save it as CSV UTF-8"),
        ("file,p,q\na.png,1,x\n", {"label_column": "p,q"}, "column q of list.csv holds x, not 0 or 1"),
        ("file,p,q\na.png,1,\n", {"label_column": "p,q"}, "column q of list.csv has an empty cell; write 0 or 1"),
        ("file,p,q\na.png,-1,0\n", {"label_column": "p,q"}, "column p of list.csv has -1; write 0 or 1"),
        ("file,p,q\na.png,0,0\na.png,1,0\n", {"label_column": "p,q"}, "several rows with different labels for a.png"),
    ],
)  # fmt: skip
def test_a_list_that_can_not_be_used_gets_one_line(tmp_path, text, keys, message):
    with pytest.raises(DataError, match=message) as raised:
        listed(tmp_path, text, **keys)
    assert "\n" not in str(raised.value)


def test_a_list_needs_a_folder_of_images_and_a_kind_that_can_be_read(tmp_path):
    (tmp_path / "list.xlsx").write_bytes(b"PK")
    path = folder(tmp_path / "images", "a.png")
    with pytest.raises(DataError, match=r"list.xlsx is not a table that can be read; save it as CSV"):
        open_source(str(path), labels=str(tmp_path / "list.xlsx"))
    with pytest.raises(DataError, match=r"there is no file or folder .*absent\.csv"):
        open_source(str(path), labels=str(tmp_path / "absent.csv"))
    with pytest.raises(DataError, match=r"images is not a file that can be read; check --labels"):
        open_source(str(path), labels=str(path))
    for name in ("digits", str(write_parquet(tmp_path / "table"))):
        with pytest.raises(DataError, match=r"--labels names files of images, but .* give a folder of images"):
            open_source(name, labels=str(tmp_path / "list.csv"))


# ------------------------------------------------------------------------------------------ several findings


@pytest.mark.parametrize(
    ("text", "keys", "expected"),
    [
        (  # a column for each finding
            "file,age,cyst,mass,edema\na.png,40,1,0,0\nb.png,50,1,1,0\nc.png,60,0,0,0\n",
            {"label_column": "cyst,mass,edema"},
            (("cyst", "mass", "edema"), [[1, 0, 0], [1, 1, 0], [0, 0, 0]]),
        ),
        (
            "file,cyst,mass\na.png,true,false\nb.png,true,true\nc.png,false,false\n",
            {"label_column": "mass, cyst"},
            (("mass", "cyst"), [[0, 1], [1, 1], [0, 0]]),
        ),
        (  # a column of names
            "file,label\na.png,cyst\nb.png,cyst;mass\nc.png,\n",
            {},
            (("cyst", "mass"), [[1, 0], [1, 1], [0, 0]]),
        ),
        (
            "file,labels\na.png,cyst\nb.png,mass | cyst\nc.png,mass\n",
            {},
            (("cyst", "mass"), [[1, 0], [1, 1], [0, 1]]),
        ),
        (  # a row for each finding
            "file,label\na.png,cyst\nb.png,cyst\nb.png,mass\nc.png,mass\n",
            {},
            (("cyst", "mass"), [[1, 0], [1, 1], [0, 1]]),
        ),
    ],
)  # fmt: skip
def test_several_findings_per_image_in_every_form(tmp_path, text, keys, expected):
    listed(tmp_path, text, **keys)
    source = open_source(str(tmp_path / "images"), labels=str(tmp_path / "list.csv"), **keys)
    found = find_labels(Rows(source), MULTI)
    assert (found.names, found.targets(labels_of(Rows(source)), source).tolist()) == expected


def test_several_columns_of_numbers_are_those_of_a_regression(tmp_path):
    text = "file,x,y\na.png,1,0.5\nb.png,2,-3\nc.png,0,\n"
    assert listed(tmp_path, text, label_column="x,y") == {"a.png": [1.0, 0.5], "b.png": [2.0, -3.0], "c.png": None}


def test_prepare_keeps_the_names_of_findings(tmp_path):
    path = folder(tmp_path / "images", "a.png", "b.png")
    (tmp_path / "list.csv").write_text("file,cyst,mass,edema\na.png,1,0,0\nb.png,1,1,0\n")
    keys = {"labels": str(tmp_path / "list.csv"), "label_column": "cyst,mass,edema"}
    prepare(PrepareRecipe(dataset=str(path), output_dir=str(tmp_path / "out"), num_workers=0, **keys))
    source = open_source(str(tmp_path / "out"))
    found = find_labels(Rows(source), MULTI)
    assert found.names == ("cyst", "mass", "edema")
    assert found.targets(labels_of(Rows(source)), source).tolist() == [[1, 0, 0], [1, 1, 0]]


@pytest.mark.parametrize("table", ["metadata.csv", "list.csv"])
def test_tables_are_read_once_for_all_splits(tmp_path, monkeypatch, table):
    names = ("train/a.png", "train/b.png", "test/c.png", "test/d.png")
    path = folder(tmp_path / "i", *names)
    (path if table == "metadata.csv" else tmp_path).joinpath(table).write_text(
        csv_of(dict(zip(names, "xyxx", strict=True)))
    )
    read = []
    monkeypatch.setattr(label_files, "Table", lambda url: read.append(url) or Table(url))
    place = locate(SplitKeys(dataset=str(path), labels=None if table == "metadata.csv" else str(tmp_path / table)))
    sources = {split: open_split(place, split) for split in ("train", "test")}
    assert {split: source.known_labels() for split, source in sources.items()} == {
        "train": ["x", "y"],
        "test": ["x", "x"],
    }
    assert len(read) == 1


@pytest.mark.parametrize(("problem", "left"), [(SINGLE, 3), (None, 3), (MULTI, 4)])
def test_an_empty_cell_is_a_missing_label_unless_an_image_may_have_none(tmp_path, problem, left, caplog):
    sheet = {**dict(list(SHEET.items())[:3]), "001/d.png": ""}
    write_metadata(folder(tmp_path / "i"), "csv", sheet)
    keys = SplitKeys(dataset=str(tmp_path / "i"), eval_dataset=str(tmp_path / "i"))
    rows, eval_rows, _ = open_splits(keys, labelled=True, problem=problem)
    assert len(rows) == len(eval_rows) == left
    message = "1 images of split train have an empty label in metadata.csv, column label, and are left out"
    assert any(message in line for line in caplog.messages) == (left == 3)


def test_a_line_of_a_jsonl_table_ends_at_its_line_end_alone(tmp_path):
    rows = [{"file_name": name, "label": f"a\u2028{name[0]}"} for name in IMAGES]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    source = open_source(str(folder(tmp_path / "i", metadata_jsonl=text)))
    assert [row.label for row in source.read(0, [0, 1, 2, 3])] == [row["label"] for row in rows]


def test_columns_of_0_and_1_are_the_numbers_of_a_regression_too(tmp_path):
    folder(tmp_path / "i", "a.png", "b.png", "c.png")
    (tmp_path / "list.csv").write_text("file,x,y\na.png,1,0\nb.png,1,1\nc.png,0,0\n")
    source = open_source(str(tmp_path / "i"), labels=str(tmp_path / "list.csv"), label_column="x,y")
    labels = find_labels(Rows(source), "regression")
    assert len(labels.names) == 2
    assert labels.targets(labels_of(Rows(source)), source).tolist() == [[1, 0], [1, 1], [0, 0]]
