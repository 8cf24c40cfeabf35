import io
import json
import multiprocessing
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("datasets")
import fsspec
from bad_images import npy
from image_sets import (
    NAMES,
    check_images,
    image_table,
    png,
    read_all,
    samples,
    splits_of,
    upload,
    write_files,
    write_parquet,
    write_tar,
)

from hf_mae.data import tars
from hf_mae.data.sources import open_source
from hf_mae.errors import DataError

pytestmark = pytest.mark.usefixtures("own_caches")


# ------------------------------------------------------------------------------------------ folders


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
    assert "1 link that leads nowhere (c.png)" in caplog.text


def test_npy_files_come_as_their_bytes_whatever_is_in_them(tmp_path):
    # Read as arrays, a broken header would raise any exception here, outside of the decoder that counts bad files.
    files = {"a.npy": npy(np.arange(2 * 3 * 13).reshape(2, 3, 13)), "b.npy": b"\x93NUMPY\x01\0\x03\0{'(", "c.npy": b""}
    write_files(tmp_path / "d", files)
    assert [row.image for row in read_all(open_source(str(tmp_path / "d")))] == list(files.values())


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
    mapped = open_source(url, streaming=False)
    assert [(row.image, row.label) for row in read_all(mapped)] == [
        (files[name], NAMES.index(name.split("/")[1])) for name in sorted(files)
    ]


def test_a_folder_with_a_zip_of_images_is_mapped(tmp_path):
    (tmp_path / "d").mkdir()
    with zipfile.ZipFile(tmp_path / "d" / "images.zip", "w") as archive:
        for i in range(5):
            archive.writestr(f"{NAMES[i % 3]}/{i}.png", png(i))
    source = open_source(str(tmp_path / "d"))
    assert sorted(row.image for row in read_all(source)) == sorted(png(i) for i in range(5))
    assert source.fingerprint["files"] == [["images.zip", (tmp_path / "d" / "images.zip").stat().st_size]]


# ------------------------------------------------------------------------------------------ tars


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
    for content in (b"", b"3", b"[1]", b"{}", b"[" * 100_000):
        path = str(write_tar(tmp_path / "c.tar", samples(range(2), lambda i, content=content: ("json", content))))
        assert {row.label for row in read_all(open_source(path))} == {None}


def test_a_tar_with_several_images_a_sample_needs_the_name_of_one(tmp_path):
    members = [(f"{i}.{field}", png(i + j)) for i in range(3) for j, field in enumerate(("jpg", "seg.png"))]
    path = str(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(DataError, match=r"several images per sample \(jpg, seg.png\); choose one with --image_column"):
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


# ------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("name", ["./absent", "~/absent", "/absent/x", "a/b/c", "x.tar", "file:///absent", "no/*.jpg"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(DataError, match="there is no file or folder"):
        open_source(name)


def test_folders_and_files_without_images_say_what_was_expected(tmp_path):
    write_files(tmp_path / "d", {"a.txt": b"", "b.csv": b""})
    with pytest.raises(DataError, match=r"no images in .*; expected files ending in \.jpg"):
        open_source(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"matches \.txt files; give one kind: \.parquet"):
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
                with pytest.raises(DataError, match=rf"{name}.* is not (a complete parquet file|an uncompressed tar)"):
                    open_source(str(tmp_path / name), streaming=streaming)
    with pytest.raises(DataError, match=r"a\.parquet is not a complete parquet file"):
        open_source(str(tmp_path / "a.parquet"), streaming=False)


def test_a_local_file_that_vanishes_is_no_bad_sample(tmp_path):
    write_files(tmp_path / "d", {"a.png": png(1)})
    write_parquet(tmp_path / "p", files=1)
    sources = [open_source(str(tmp_path / "d")), open_source(str(tmp_path / "p"), streaming=True)]
    (tmp_path / "d" / "a.png").unlink()
    (tmp_path / "p" / "train-00000-of-00001.parquet").unlink()
    for source in sources:
        with pytest.raises(DataError, match="cannot open"):
            source.read(0, [0])


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
