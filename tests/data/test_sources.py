import io
import json
import logging
import multiprocessing
import os
import pickle
import random
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("datasets")
import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from bad_images import npy

from hf_mae.data import remote, tars
from hf_mae.data.decode import BadImage, decode_image
from hf_mae.data.locate import locate
from hf_mae.data.sources import open_source
from hf_mae.errors import DataError, SourceUnavailable
from hf_mae.keys.data_keys import DataKeys

NAMES = ["cat", "dog", "emu"]


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Caches of this test alone, and no pauses between tries."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "hf" / "downloads")
    monkeypatch.setattr(remote, "RETRY_FIRST_DELAY", 0.001)
    datasets.disable_progress_bars()
    yield
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def png(number: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.full((4, 4, 3), number % 256, np.uint8)
    pixels[0, 0] = number // 256
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def image_table(numbers, label: str = "label", image: str = "image") -> datasets.Dataset:
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=NAMES)})
    rows = {image: [{"bytes": png(i), "path": f"{i}.png"} for i in numbers], label: [i % 3 for i in numbers]}
    return datasets.Dataset.from_dict(rows, features=features)


def write_parquet(folder, split="train", numbers=range(50), files=2, group=10):
    """Shards `split-00000-of-0000N.parquet` of numbered images, in row groups of `group` rows."""
    folder.mkdir(parents=True, exist_ok=True)
    table = image_table(numbers)
    for shard in range(files):
        path = folder / f"{split}-{shard:05d}-of-{files:05d}.parquet"
        table.shard(files, shard, contiguous=True).to_parquet(path, batch_size=group)
    return folder


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(numbers, label=lambda i: ("cls", str(i % 3).encode())):
    for i in numbers:
        yield f"some/dir.d/{i:05d}.png", png(i)
        yield f"some/dir.d/{i:05d}.{label(i)[0]}", label(i)[1]


def write_files(root, files: dict[str, bytes]):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def upload(folder, url="memory://bucket"):
    fsspec.filesystem("memory").put(str(folder), url.removeprefix("memory:/"), recursive=True)
    return url


def splits_of(name) -> list[str]:
    return list(locate(DataKeys(dataset=str(name))).splits)


def read_all(source):
    """Every row once, block by block, after a check that the blocks cover each place once and in order."""
    places = [(shard, row) for shard, start, stop in source.blocks for row in range(start, stop)]
    assert places == [(shard, row) for shard, size in enumerate(source.shard_sizes) for row in range(size)]
    rows = [row for shard, start, stop in source.blocks for row in source.read(shard, range(start, stop))]
    assert [(row.shard, row.row) for row in rows] == places
    assert len({row.key for row in rows}) == len(rows) == len(source)
    return rows


def check_images(source, numbers, labels=True):
    rows = read_all(source)
    assert [row.image for row in rows] == [png(i) for i in numbers]
    assert [row.label for row in rows] == [i % 3 if labels else None for i in numbers]


# ------------------------------------------------------------------------------------------ kinds


def test_the_built_in_digits_are_all_there_scaled_to_255():
    from sklearn.datasets import load_digits

    source, digits = open_source("digits"), load_digits()
    rows = read_all(source)
    assert (len(rows), source.random_access, source.label_names) == (1797, True, [str(i) for i in range(10)])
    assert rows[5].image.shape == (8, 8, 1)
    assert rows[5].image.dtype == np.uint8
    assert all(np.array_equal(row.image[:, :, 0], np.round(digits.images[i] * 255 / 16)) for i, row in enumerate(rows))
    assert [row.label for row in rows] == digits.target.tolist()
    with pytest.raises(DataError, match="digits has no split 'test'; choose one of: train"):
        open_source("digits", split="test")


def test_a_plain_folder_is_the_split_train_in_order_of_paths(tmp_path):
    files = {"b/2.png": png(2), "a.jpg": png(0), "b/deep/1.PNG": png(1), "b/3.webp": png(3)}
    write_files(tmp_path / "d", files | {".hidden/x.png": b"", "b/.y.png": b"", "notes.txt": b""})
    source = open_source(str(tmp_path / "d"))
    rows = read_all(source)
    assert [row.key for row in rows] == sorted(files)
    assert [row.image for row in rows] == [files[name] for name in sorted(files)]
    assert {row.label for row in rows} == {None}
    assert source.label_names is None
    assert splits_of(tmp_path / "d") == ["train"]
    with pytest.raises(DataError, match="has no split 'validation'; choose one of: train"):
        open_source(str(tmp_path / "d"), split="validation")


def test_class_folders_are_labels_with_the_same_numbers_in_every_split(tmp_path):
    files = {f"train/{NAMES[i % 3]}/{i}.png": png(i) for i in range(6)}
    write_files(tmp_path / "d", files | {"val/emu/x.png": png(9), "val/cat/x.png": png(10)})
    assert splits_of(tmp_path / "d") == ["train", "validation"]
    train = open_source(str(tmp_path / "d"))
    assert train.label_names == NAMES
    assert [(row.key, row.label) for row in read_all(train)] == [
        (name, NAMES.index(name.split("/")[1])) for name in sorted(files)
    ]
    for split in ("validation", "val", "valid"):
        validation = open_source(str(tmp_path / "d"), split=split)
        assert [row.label for row in read_all(validation)] == [0, 2]
    with pytest.raises(DataError, match="no split 'test'; choose one of: train, validation"):
        open_source(str(tmp_path / "d"), split="test")


def test_images_on_several_levels_have_no_labels(tmp_path):
    write_files(tmp_path / "d", {"a/1.png": png(1), "a/b/2.png": png(2), "c/3.png": png(3)})
    source = open_source(str(tmp_path / "d"))
    assert (source.label_names, {row.label for row in read_all(source)}) == (None, {None})


def test_any_direct_subfolder_can_be_asked_for_as_a_split(tmp_path):
    write_files(tmp_path / "d", {"extra/1.png": png(1), "more/2.png": png(2)})
    assert [row.image for row in read_all(open_source(str(tmp_path / "d"), split="extra"))] == [png(1)]


def test_links_are_followed_but_not_in_circles_or_to_nowhere(tmp_path, caplog):
    write_files(tmp_path / "d", {"a/1.png": png(1)})
    write_files(tmp_path / "elsewhere", {"2.png": png(2)})
    (tmp_path / "d" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "a" / "up").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "c.png").symlink_to(tmp_path / "gone.png")
    source = open_source(str(tmp_path / "d"))
    assert [row.key for row in read_all(source)] == ["a/1.png", "b/2.png"]
    assert "1 links lead nowhere" in caplog.text


def test_npy_files_come_as_their_bytes_whatever_is_in_them(tmp_path):
    # Read as arrays, a broken header would raise any exception here, outside of the decoder that counts bad files.
    files = {"a.npy": npy(np.arange(2 * 3 * 13).reshape(2, 3, 13)), "b.npy": b"\x93NUMPY\x01\0\x03\0{'(", "c.npy": b""}
    write_files(tmp_path / "d", files)
    assert [row.image for row in read_all(open_source(str(tmp_path / "d")))] == list(files.values())


@pytest.mark.parametrize("streaming", [None, True])
def test_local_parquet_is_mapped_by_default_and_read_in_place_if_asked(tmp_path, streaming):
    folder = write_parquet(tmp_path / "d" / "data")
    write_parquet(folder, "test", range(60, 70), files=1)
    assert splits_of(tmp_path / "d") == ["train", "test"]
    for name in (tmp_path / "d", folder / "train-*.parquet", folder / "train-{00000..00001}-of-00002.parquet"):
        source = open_source(str(name), streaming=streaming)
        assert source.label_names == NAMES
        assert source.random_access is (streaming is None)
        assert len(source.blocks) == (6 if streaming else 1)
        check_images(source, range(50))
    check_images(open_source(f"file://{folder}/test-00000-of-00001.parquet", streaming=streaming), range(60, 70))
    check_images(open_source(str(tmp_path / "d"), split="test", streaming=streaming), range(60, 70))


def test_rows_come_in_the_order_asked_for_and_a_block_is_fetched_once(tmp_path, monkeypatch):
    write_parquet(tmp_path / "d", files=1)
    for streaming in (None, True):
        source = open_source(str(tmp_path / "d"), streaming=streaming)
        assert [row.image for row in source.read(0, [19, 10, 15])] == [png(19), png(10), png(15)]
        assert source.read(0, []) == []
    opened = []
    monkeypatch.setattr("hf_mae.data.parquet.open_bytes", lambda url: opened.append(url) or remote.open_bytes(url))
    for row in range(20, 30):
        source.read(0, [row])
    assert len(opened) == 1


@pytest.mark.parametrize("form", ["dataset", "dict"])
def test_what_save_to_disk_wrote_is_read(tmp_path, form):
    table = image_table(range(30)).select(range(29, -1, -1))
    (table if form == "dataset" else datasets.DatasetDict(train=table, dev=table)).save_to_disk(tmp_path / "d")
    assert splits_of(tmp_path / "d") == (["train"] if form == "dataset" else ["train", "dev"])
    source = open_source(str(tmp_path / "d"))
    assert (source.label_names, source.random_access) == (NAMES, True)
    check_images(source, range(29, -1, -1))


@pytest.mark.parametrize("where", ["folder", "file", "glob", "braces", "memory"])
def test_tars_give_samples_with_labels_from_cls(tmp_path, where):
    for shard in range(2):
        numbers = range(300 * shard, 300 * (shard + 1))
        write_tar(tmp_path / "d" / f"train-{shard:03d}.tar", samples(numbers))
    name = {
        "folder": tmp_path / "d",
        "file": tmp_path / "d" / "train-000.tar",
        "glob": tmp_path / "d" / "*.tar",
        "braces": tmp_path / "d" / "train-{000..001}.tar",
        "memory": "memory://bucket/train-{000..001}.tar",
    }[where]
    upload(tmp_path / "d")
    source = open_source(str(name))
    assert source.shard_names[0] == "train-000.tar"
    assert source.random_access is (where != "memory")
    if where == "memory":
        assert source.blocks == [(0, 0, 256), (0, 256, 300), (1, 0, 256), (1, 256, 300)]
    check_images(source, range(300 if where == "file" else 600))
    assert [row.image for row in source.read(0, [7, 3])] == [png(7), png(3)]


def test_tar_labels_come_from_json_and_from_named_members(tmp_path):
    def label(i):
        return "json", json.dumps({"label": i % 3, "other": f"x{i}"}).encode()

    path = str(write_tar(tmp_path / "a.tar", samples(range(5), label)))
    check_images(open_source(path), range(5))
    assert [row.label for row in read_all(open_source(path, label_column="other"))] == [f"x{i}" for i in range(5)]
    with pytest.raises(DataError, match=r"no member \.absent .*; choose another --label_column"):
        open_source(path, label_column="absent")
    path = str(write_tar(tmp_path / "b.tar", samples(range(5), lambda i: ("txt", b"word"))))
    assert {row.label for row in read_all(open_source(path))} == {None}
    assert {row.label for row in read_all(open_source(path, label_column="txt"))} == {"word"}


def test_a_tar_with_several_images_a_sample_needs_the_name_of_one(tmp_path):
    members = [(f"{i}.{field}", png(i + j)) for i in range(3) for j, field in enumerate(("jpg", "seg.png"))]
    path = str(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(DataError, match=r"several images a sample \(jpg, seg.png\); choose one with --image_column"):
        open_source(path)
    assert [row.image for row in read_all(open_source(path, image_column="seg.png"))] == [png(1), png(2), png(3)]
    with pytest.raises(DataError, match=r"no sample of .* has a member \.gif"):
        open_source(path, image_column="gif")


def test_member_names_of_a_tar_are_never_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_tar(tmp_path / "a.tar", [("../../evil.png", png(1)), ("/abs.png", png(2)), (".png", png(3))])
    before = sorted(tmp_path.parent.rglob("*"))
    assert [row.key for row in read_all(open_source(str(path)))] == ["a.tar#0", "a.tar#1"]
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("in_bucket", [False, True])
@pytest.mark.parametrize("cut", ["image body", "label header", "between samples", "image header", "first image"])
def test_a_truncated_tar_keeps_its_complete_samples_and_has_one_bad_row_for_the_rest(tmp_path, caplog, cut, in_bucket):
    path = write_tar(tmp_path / "d" / "a.tar", samples(range(20)))
    with tarfile.open(path) as tar:
        image, label = tar.getmembers()[20:22]  # of sample 10
    size = {
        "image body": image.offset_data + 10,
        "label header": label.offset + 100,
        "between samples": image.offset,
        "image header": image.offset + 5,
        "first image": 520,
    }[cut]
    os.truncate(path, size)
    name = upload(tmp_path / "d") + "/a.tar" if in_bucket else str(path)
    *whole, last = read_all(open_source(name))
    assert [row.image for row in whole] == [png(i) for i in range(0 if cut == "first image" else 10)]
    assert [row.label for row in whole] == [i % 3 for i in range(len(whole))]
    assert (last.key, last.image.reason, last.label) == (f"a.tar#{len(whole)}", "TruncatedTar", None)
    assert f"{name} ends early" in caplog.text


def test_the_bad_row_of_a_truncated_tar_may_be_alone_in_its_block(tmp_path):
    path = write_tar(tmp_path / "d" / "a.tar", samples(range(257)))
    with tarfile.open(path) as tar:
        os.truncate(path, tar.getmembers()[512].offset_data + 10)
    source = open_source(upload(tmp_path / "d") + "/a.tar")
    assert source.blocks == [(0, 0, 256), (0, 256, 257)]
    assert source.read(0, [256])[0].image.reason == "TruncatedTar"
    assert source.read(0, [255])[0].image == png(255)


def test_the_index_of_a_remote_tar_is_kept_where_it_is_slow_to_make(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", samples(range(5)))
    fs = fsspec.filesystem("memory")
    fs.put(str(path), "/a.tar")
    monkeypatch.setattr(type(fs), "info", lambda self, path: {"name": path, "size": 1, "ETag": "v1"})
    monkeypatch.setattr(tars, "INDEX_CACHE_SECONDS", -1.0)
    made = []
    make = tars._make_index
    monkeypatch.setattr(tars, "_make_index", lambda *args: made.append(args) or make(*args))
    for _ in range(2):
        check_images(open_source("memory://a.tar"), range(5))
    assert len(made) == 1
    monkeypatch.setattr(type(fs), "info", lambda self, path: {"name": path, "size": 1, "ETag": "v2"})
    open_source("memory://a.tar")
    assert len(made) == 2


def test_a_url_of_parquet_is_streamed_with_the_splits_that_its_names_say(tmp_path):
    write_parquet(tmp_path / "d" / "data")
    write_parquet(tmp_path / "d" / "data", "validation", range(60, 70), files=1)
    url = upload(tmp_path / "d")
    assert splits_of(url) == ["train", "validation"]
    for name in (url, f"{url}/data/train-*.parquet", f"{url}/data/train-{{00000..00001}}-of-00002.parquet"):
        source = open_source(name)
        assert (source.random_access, source.label_names) == (False, NAMES)
        assert source.shard_names == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
        check_images(source, range(50))
    check_images(open_source(url, split="validation"), range(60, 70))
    check_images(open_source(url, streaming=False), range(50))


def test_a_url_of_images_is_read_in_blocks_of_64_files(tmp_path):
    files = {f"train/{NAMES[i % 3]}/{i:03d}.png": png(i) for i in range(70)}
    write_files(tmp_path / "d", files | {"val/dog/1.png": png(1)})
    url = upload(tmp_path / "d")
    assert splits_of(url) == ["train", "validation"]
    source = open_source(url)
    assert source.blocks == [(0, 0, 64), (0, 64, 70)]
    assert [(row.key, row.image, row.label) for row in read_all(source)] == [
        (name, files[name], NAMES.index(name.split("/")[1])) for name in sorted(files)
    ]
    assert len(open_source(f"{url}/train/cat/*.png")) == 24


def array_tables():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 4, 5, 3), dtype=np.uint8)
    fixed = datasets.Features({"pixels": datasets.Array3D((4, 5, 3), "uint8"), "cls": datasets.Value("int64")})
    gray = datasets.Features({"pixels": datasets.Array2D((4, 5), "float32"), "cls": datasets.Value("int64")})
    lists = datasets.Features({"pixels": [[[datasets.Value("uint16")]]], "cls": datasets.Value("int64")})
    return [(pixels, fixed), (pixels[..., 0].astype(np.float32) / 7, gray), (pixels.astype(np.uint16), lists)]


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("streaming", [None, True])
def test_columns_of_numbers_come_as_arrays_in_their_own_dtype(tmp_path, case, streaming):
    pixels, features = array_tables()[case]
    table = datasets.Dataset.from_dict({"pixels": pixels.tolist(), "cls": list(range(6))}, features=features)
    table.to_parquet(tmp_path / "a.parquet", batch_size=4)
    rows = read_all(open_source(str(tmp_path / "a.parquet"), streaming=streaming))
    for row, wanted in zip(rows, pixels, strict=True):
        assert row.image.dtype == wanted.dtype
        assert np.array_equal(row.image, wanted)
    assert [row.label for row in rows] == list(range(6))


def test_a_folder_with_a_zip_of_images_is_mapped(tmp_path):
    (tmp_path / "d").mkdir()
    with zipfile.ZipFile(tmp_path / "d" / "images.zip", "w") as archive:
        for i in range(5):
            archive.writestr(f"{NAMES[i % 3]}/{i}.png", png(i))
    source = open_source(str(tmp_path / "d"))
    assert sorted(row.image for row in read_all(source)) == sorted(png(i) for i in range(5))
    assert source.fingerprint["files"] == [["images.zip", (tmp_path / "d" / "images.zip").stat().st_size]]


# ------------------------------------------------------------------------------------------ columns


def write_table(tmp_path, columns: dict):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


@pytest.mark.parametrize("streaming", [None, True])
def test_a_binary_column_holds_images_where_none_has_their_type(tmp_path, streaming):
    path = write_table(tmp_path, {"id": ["a", "b"], "jpg": [png(0), png(1)], "labels": ["x", "y"]})
    assert [(row.image, row.label) for row in read_all(open_source(path, streaming=streaming))] == [
        (png(0), "x"),
        (png(1), "y"),
    ]
    with pytest.raises(DataError, match=r"column 'id' of .* holds Value.*, which is no image"):
        open_source(path, streaming=streaming, image_column="id")


def test_an_unclear_or_missing_image_column_lists_the_columns(tmp_path):
    path = write_table(tmp_path, {"left": [png(0)], "right": [png(1)], "label": [1]})
    with pytest.raises(DataError, match=r"several columns of images \(left, right\).* --image_column NAME"):
        open_source(path)
    assert read_all(open_source(path, image_column="right"))[0].image == png(1)
    with pytest.raises(
        DataError, match="no column 'rihgt' for --image_column; did you mean 'right'\\? its columns: left"
    ):
        open_source(path, image_column="rihgt")
    with pytest.raises(DataError, match="no column 'nothing' for --label_column; its columns"):
        open_source(path, image_column="left", label_column="nothing")
    path = write_table(tmp_path, {"text": ["a"], "numbers": [[1, 2]]})
    with pytest.raises(DataError, match="no column of images among text, numbers; choose one with --image_column"):
        open_source(path)


def test_of_two_classes_the_usual_name_is_the_label(tmp_path):
    classes = {name: datasets.ClassLabel(names=NAMES) for name in ("coarse_label", "fine_label")}
    features = datasets.Features({"image": datasets.Image(), **classes})
    rows = {"image": [{"bytes": png(0), "path": None}], "coarse_label": [0], "fine_label": [2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert read_all(open_source(path))[0].label == 2
    assert read_all(open_source(path, label_column="coarse_label"))[0].label == 0


@pytest.mark.parametrize("in_bucket", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_path_in_the_data_is_not_followed(tmp_path, streaming, in_bucket):
    secret = write_files(tmp_path, {"secret.png": png(7)}) / "secret.png"
    rows = [{"bytes": None, "path": str(secret)}, {"bytes": png(1), "path": str(secret)}, None]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"image": pa.array(rows)}, features.arrow_schema), tmp_path / "d" / "a.parquet")
    source = open_source(upload(tmp_path / "d") if in_bucket else str(tmp_path / "d"), streaming=streaming)
    first, second, third = read_all(source)
    assert second.image == png(1)
    assert first.image.reason == third.image.reason == "NoBytes"
    with pytest.raises(BadImage, match=r"no image bytes \(at most a path, which is not followed"):
        decode_image(first.image, 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_lists_of_numbers_that_make_no_array_are_bad_rows(tmp_path, streaming):
    whole, ragged, gap = [[1, 2], [3, 4]], [[1, 2], [3]], [[1, None], [3, 4]]
    features = datasets.Features({"pixels": [[datasets.Value("uint8")]]})
    table = datasets.Dataset.from_dict({"pixels": [whole, ragged, gap, [], None]}, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    first, *others = read_all(open_source(str(tmp_path / "a.parquet"), streaming=streaming))
    assert first.image.tolist() == whole
    assert [row.image.reason for row in others] == ["RaggedArray"] * 3 + ["NoBytes"]


# ------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("name", ["./absent", "~/absent", "/absent/x", "a/b/c", "x.tar", "file:///absent", "no/*.jpg"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(DataError, match="there is no file or folder"):
        open_source(name)


def test_folders_and_files_without_images_say_what_was_expected(tmp_path):
    write_files(tmp_path / "d", {"a.txt": b"", "b.csv": b""})
    with pytest.raises(DataError, match=r"no images in .*; expected files ending in \.jpg"):
        open_source(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"is \.txt; give files of one kind: \.parquet"):
        open_source(str(tmp_path / "d" / "a.txt"))
    with pytest.raises(DataError, match=r"there is no file or folder .*0\.tar; check the numbers"):
        open_source(str(tmp_path / "{0..1}.tar"))
    with pytest.raises(DataError, match="no images in memory://nothing"):
        open_source("memory://nothing")
    with pytest.raises(DataError, match=r"cannot read memory://nothing\.parquet"):
        open_source("memory://nothing.parquet")
    with pytest.raises(DataError, match=r"cannot open nosuch://x\.tar"):
        open_source("nosuch://x.tar")


def test_files_that_are_not_what_they_are_called_are_named(tmp_path):
    for name in ("a.parquet", "a.tar"):
        for content in (b"", b"rubbish" * 1000):
            (tmp_path / name).write_bytes(content)
            for streaming in (True, None):
                with pytest.raises(DataError, match=rf"{name}.* is not (a whole parquet file|an uncompressed tar)"):
                    open_source(str(tmp_path / name), streaming=streaming)
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet"):
        open_source(str(tmp_path / "a.parquet"), streaming=False)


def damage_row_group(path, group, column=0):
    """Overwrite the pages of a column."""
    found = pq.read_metadata(path).row_group(group).column(column)
    with open(path, "r+b") as file:
        file.seek(found.data_page_offset)
        file.write(b"\xff" * found.total_compressed_size)


@pytest.mark.parametrize("in_bucket", [False, True])
def test_a_corrupt_row_group_costs_its_own_rows_only(tmp_path, caplog, monkeypatch, in_bucket):
    folder = write_parquet(tmp_path / "d", files=1)
    damage_row_group(folder / "train-00000-of-00001.parquet", 2)
    source = open_source(upload(folder) if in_bucket else str(folder), streaming=True)
    opened = []
    monkeypatch.setattr("hf_mae.data.parquet.open_bytes", lambda url: opened.append(url) or remote.open_bytes(url))
    rows = read_all(source)
    for number, row in enumerate(rows):
        assert row.image.reason == "CorruptRowGroup" if 20 <= number < 30 else row.image == png(number)
    assert caplog.text.count("row group 2 of train-00000-of-00001.parquet is corrupt") == 1
    assert len(opened) == (6 if in_bucket else 5)  # a transfer may have corrupted it: fetched once more


def test_local_parquet_with_a_corrupt_page_is_read_in_place_for_its_other_rows(tmp_path, caplog):
    folder = write_parquet(tmp_path / "d", files=1)
    damage_row_group(folder / "train-00000-of-00001.parquet", 2)
    rows = read_all(open_source(str(folder)))
    assert [row.row for row in rows if isinstance(row.image, BadImage)] == list(range(20, 30))
    assert "they are read in place" in caplog.text
    with pytest.raises(DataError, match="cannot read"):
        open_source(str(folder), streaming=False)


def test_a_row_group_that_the_network_corrupted_is_fetched_again_and_loses_nothing(tmp_path, monkeypatch):
    source = open_source(upload(write_parquet(tmp_path / "d", files=1)))
    fetch, corrupted = remote.RemoteFile._fetch, []

    def corrupt_once(self, start, stop):
        data = fetch(self, start, stop)
        if corrupted:
            return data
        corrupted.append((start, stop))
        return bytes(len(data))

    monkeypatch.setattr(remote.RemoteFile, "_fetch", corrupt_once)
    check_images(source, range(50))
    assert corrupted


def test_a_flipped_bit_in_a_page_with_a_checksum_is_found(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png(i) for i in range(3)]}), path, compression="none", write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.find(png(1)) + 60] ^= 1
    path.write_bytes(content)
    assert {row.image.reason for row in read_all(open_source(str(path), streaming=True))} == {"CorruptRowGroup"}


@pytest.mark.parametrize("streaming", [True, None])
def test_parquet_that_says_rubbish_of_its_columns_is_named(tmp_path, streaming):
    table = pa.table({"image": [png(0)]}).replace_schema_metadata({"huggingface": b'{"info": {"feat\xff'})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"what a\.parquet says of its columns is corrupt .*; fetch it again"):
        open_source(str(tmp_path / "a.parquet"), streaming=streaming)


@pytest.mark.parametrize("flipped", ["offset", "length"])
def test_a_saved_table_with_a_flipped_bit_is_an_error_before_it_ends_the_process(tmp_path, flipped):
    image_table(range(30)).save_to_disk(tmp_path / "d")
    (path,) = (tmp_path / "d").glob("*.arrow")
    content = bytearray(path.read_bytes())
    sizes = np.cumsum([0] + [len(png(i)) for i in range(30)]).astype("<i4").tobytes()
    at = content.find(sizes)
    assert at > 0
    content[at + (40 if flipped == "offset" else 4 * 30) + 3] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"the table of .* is corrupt .*; make it again"):
        open_source(str(tmp_path / "d"))


def test_labels_that_are_no_text_make_a_row_group_corrupt(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"image": [png(i) for i in range(3)], "label": ["a", "marked", "c"]}
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False, write_statistics=False)
    content = bytearray(path.read_bytes())
    content[content.find(b"marked") + 1] = 0xFF
    path.write_bytes(content)
    assert {row.image.reason for row in read_all(open_source(str(path), streaming=True))} == {"CorruptRowGroup"}


def test_a_local_file_that_vanishes_is_no_bad_sample(tmp_path):
    write_files(tmp_path / "d", {"a.png": png(1)})
    write_parquet(tmp_path / "p", files=1)
    sources = [open_source(str(tmp_path / "d")), open_source(str(tmp_path / "p"), streaming=True)]
    (tmp_path / "d" / "a.png").unlink()
    (tmp_path / "p" / "train-00000-of-00001.parquet").unlink()
    for source in sources:
        with pytest.raises(DataError, match="cannot open"):
            source.read(0, [0])


class HttpError(OSError):
    def __init__(self, status):
        super().__init__(f"HTTP {status} for https://host/file?signature=secret")
        self.status = status


class FaultyFile:
    """A remote file whose reads raise what is left in `faults`, or bring half of the bytes for None."""

    def __init__(self, data, faults):
        self.data, self.faults, self.position, self.size = data, faults, 0, len(data)

    def seekable(self):
        return True

    def seek(self, position):
        self.position = position

    def read(self, size):
        if self.faults:
            fault = self.faults.pop(0)
            if fault is not None:
                raise fault
            size //= 2
        return self.data[self.position : self.position + size]


@pytest.fixture
def network(tmp_path, monkeypatch):
    """Parquet, tar and images in a bucket, and a list: put faults in, and the next reads have them."""
    write_parquet(tmp_path / "d", files=1)
    write_tar(tmp_path / "d" / "a.tar", samples(range(50)))
    write_files(tmp_path / "d" / "images", {f"{i:02d}.png": png(i) for i in range(3)})
    upload(tmp_path / "d")
    faults = []
    memory = fsspec.filesystem("memory")
    store = {path: file.getvalue() for path, file in memory.store.items()}
    monkeypatch.setattr(
        type(memory), "open", lambda self, path, *_, **__: FaultyFile(store["/" + path.strip("/")], faults)
    )
    monkeypatch.setattr(
        type(memory), "cat_file", lambda self, path: FaultyFile(store["/" + path.strip("/")], faults).read(10**9)
    )
    return faults


TRANSIENT = [TimeoutError(), HttpError(503), HttpError(429), OSError("odd")]


@pytest.mark.parametrize("file", ["train-00000-of-00001.parquet", "a.tar", "images"])
def test_a_read_that_fails_a_few_times_is_tried_again_and_loses_nothing(network, caplog, file):
    numbers = range(3 if file == "images" else 50)
    with_half = [] if file == "images" else [None]  # whole files have no size to compare with
    source = open_source(f"memory://bucket/{file}")
    network.extend([*with_half, *TRANSIENT])
    check_images(source, numbers, labels=file != "images")
    assert not network
    assert len([r for r in caplog.records if r.levelno == logging.WARNING and "of 6 for" in r.message]) == len(
        [*with_half, *TRANSIENT]
    )
    assert "secret" not in caplog.text
    network.append(HttpError(500))
    assert len(open_source(f"memory://bucket/{file}")) == len(numbers)


@pytest.mark.parametrize("file", ["train-00000-of-00001.parquet", "a.tar", "images"])
def test_a_network_that_stays_away_ends_the_run_and_is_no_bad_sample(network, file):
    source = open_source(f"memory://bucket/{file}")
    network.extend([HttpError(502)] * 100)
    with pytest.raises(SourceUnavailable, match=r"could not be read in 6 tries .*check the network") as caught:
        source.read(0, [0])
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DataError)
    network.clear()
    assert source.read(0, [0])[0].image == png(0)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_is_forbidden_or_missing_is_not_asked_for_again(network, status):
    network.append(HttpError(status))
    with pytest.raises(DataError, match=f"cannot read .*HTTP {status}.*log in") as caught:
        open_source("memory://bucket/a.tar")
    assert not isinstance(caught.value, SourceUnavailable)
    assert not network


def test_the_pauses_double_up_to_a_bound_and_leave_the_random_numbers_alone(monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    monkeypatch.setattr(remote, "RETRY_FIRST_DELAY", 1.0)
    monkeypatch.setattr(remote, "RETRY_MAX_DELAY", 6.0)
    random.seed(0)
    before = random.getstate()
    with pytest.raises(SourceUnavailable):
        remote.with_retries(lambda: (_ for _ in ()).throw(TimeoutError()), "it")
    assert random.getstate() == before
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, [1, 2, 4, 6, 6], strict=True))


def test_what_lies_behind_an_exception_decides_whether_another_try_may_help():
    wrapped = FileNotFoundError("no data set")  # as `datasets` reports a server that is down
    wrapped.__context__ = HttpError(503)
    assert remote.is_transient(wrapped)
    assert not remote.is_transient(FileNotFoundError("no data set"))
    assert not remote.is_transient(OSError(28, "No space left on device"))
    assert not remote.is_transient(type("OfflineModeIsEnabled", (ConnectionError,), {})())
    assert not remote.is_transient(ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"))
    assert remote.is_transient(type("ConnectError", (type("TransportError", (Exception,), {}),), {})())
    assert not remote.is_transient(ValueError("a bug"))


# ------------------------------------------------------------------------------------------ identity, processes


def make_all_kinds(tmp_path) -> dict[str, str]:
    write_parquet(tmp_path / "parquet")
    write_tar(tmp_path / "tars" / "a.tar", samples(range(50)))
    write_files(tmp_path / "images", {f"{NAMES[i % 3]}/{i:02d}.png": png(i) for i in range(50)})
    image_table(range(50)).save_to_disk(tmp_path / "saved")
    return {kind: str(tmp_path / kind) for kind in ("parquet", "tars", "images", "saved")}


def test_the_fingerprint_is_that_of_the_data_not_of_its_place(tmp_path):
    prints = []
    for folder in ("one", "other"):
        names = make_all_kinds(tmp_path / folder)
        sources = [open_source(name) for name in names.values()]
        sources += [open_source(names["parquet"], streaming=True), open_source("digits")]
        prints.append([source.fingerprint for source in sources])
    assert prints[0] == prints[1]
    assert json.loads(json.dumps(prints[0])) == prints[0]
    assert str(tmp_path) not in json.dumps(prints[0])
    other = tmp_path / "other"
    write_tar(other / "tars" / "a.tar", samples(range(51)))
    (other / "images" / "cat" / "00.png").write_bytes(png(0) + b"more")
    write_parquet(other / "parquet", numbers=range(100, 150), group=5)
    image_table(range(49)).save_to_disk(tmp_path / "other" / "saved")
    for before, name in zip(prints[0], ("parquet", "tars", "images", "saved"), strict=False):
        assert open_source(str(other / name)).fingerprint != before


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_two_processes_read_at_once_without_disturbing_each_other(tmp_path, method):
    names = make_all_kinds(tmp_path)
    sources = [open_source(name) for name in names.values()] + [open_source(names["parquet"], streaming=True)]
    for source in sources:
        source.read(0, [0])
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    # One source after the other in the same two processes, as new interpreters are slow to start.
    workers = [context.Process(target=read_halves, args=(sources, number, queue)) for number in range(2)]
    for worker in workers:
        worker.start()
    halves = [queue.get(timeout=60) for _ in range(2 * len(sources))]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    for number, source in enumerate(sources):
        got = sorted(row for index, rows in halves if index == number for row in rows)
        assert got == [(row.shard, row.row, row.image) for row in read_all(source)]


def read_halves(sources, number, queue):
    for index, source in enumerate(sources):
        places = [(shard, row) for shard, size in enumerate(source.shard_sizes) for row in range(size)]
        queue.put((index, [(shard, row, source.read(shard, [row])[0].image) for shard, row in places[number::2]]))


def test_pickling_leaves_open_files_and_fetched_blocks_behind(tmp_path):
    for name in make_all_kinds(tmp_path).values():
        source = open_source(name, streaming=True)
        source.read(0, range(10))
        copy = pickle.loads(pickle.dumps(source))
        assert getattr(copy, "_last", None) is None
        assert copy.fingerprint == source.fingerprint
        check_images(copy, [i for row in read_all(source) for i in [number_of(row.image)]])
    write_parquet(tmp_path / "p", files=1)
    upload(tmp_path / "p")
    source = open_source("memory://bucket")
    source.read(0, [0])
    check_images(pickle.loads(pickle.dumps(source)), range(50))


def number_of(image: bytes) -> int:
    return int(np.asarray(Image.open(io.BytesIO(image)))[1, 1, 0])
