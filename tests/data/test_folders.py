"""Folders as people have them: odd names, links, stray files, splits further down. What is not read is said."""

import errno
import io
import os
import re
import socket
import tarfile
import zipfile

import pytest

pytest.importorskip("datasets")
from image_sets import NAMES, png, read_all, samples, upload, write_files, write_parquet, write_tar
from runs import load_finetune_recipe, mistake

from hf_mae.data.locate import locate
from hf_mae.data.sources import open_source, open_splits
from hf_mae.data.splits import like_split
from hf_mae.errors import DataError
from hf_mae.files import plain_name
from hf_mae.keys.data_keys import DataKeys, SplitKeys
from hf_mae.keys.evaluation_keys import EmbedRecipe

pytestmark = pytest.mark.usefixtures("own_caches")

ODD_NAMES = ["what?", "a#b", "50%20", "all*", "[1]", "x]", "{0..1}", "two  words", "line\nbreak", "~", "a::b"]
NOT_IN_DATASETS = ["line\nbreak", "a::b"]  # it finds no shards below such a path


def splits_of(name) -> dict[str, int]:
    place = locate(DataKeys(dataset=str(name)))
    return {split: len(files) for split, files in place.splits.items()}


def labels_of(name, split="train") -> dict[str, str | None]:
    source = open_source(str(name), split=split)
    return {row.key: source.label_names and source.label_names[row.label] for row in read_all(source)}


def images(*names: str) -> dict[str, bytes]:
    return {name: png(i) for i, name in enumerate(names)}


def unwarned(caplog) -> bool:
    return not [record for record in caplog.records if record.name.startswith("hf_mae")]


# ------------------------------------------------------------------------------------------ odd names


@pytest.mark.parametrize("odd", ODD_NAMES)
def test_odd_names_of_files_and_class_folders_are_read(tmp_path, odd, caplog):
    files = images(f"cat/{odd}.png", f"cat/1{odd}.png", f"{odd}/1.png", f"{odd}/2.png")
    write_files(tmp_path / "d", files)
    rows = read_all(open_source(str(tmp_path / "d")))
    assert {row.key: row.image for row in rows} == {plain_name(name): image for name, image in files.items()}
    assert labels_of(tmp_path / "d") == {plain_name(name): plain_name(name.split("/")[0]) for name in files}
    assert unwarned(caplog)


@pytest.mark.parametrize("odd", ODD_NAMES)
def test_a_folder_or_file_with_an_odd_name_is_not_a_pattern(tmp_path, monkeypatch, odd):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, images(f"{odd}/1.png", f"{odd}x.png", "what!/other.png", "all/other.png", "1/other.png"))
    for name, keys in {odd: ["1.png"], f"{odd}x.png": [f"{odd}x.png"]}.items():
        for given in (tmp_path / name, f"file://{tmp_path / name}", f"./{name}"):
            assert [row.key for row in read_all(open_source(str(given)))] == [plain_name(key) for key in keys]


@pytest.mark.parametrize("streaming", [True, None])
@pytest.mark.parametrize("odd", [name for name in ODD_NAMES if name not in NOT_IN_DATASETS])
def test_a_folder_of_parquet_with_an_odd_name_is_read(tmp_path, odd, streaming):
    # Names that the odd ones match if they are taken for patterns.
    for other in ("whats", "all", "1"):
        write_parquet(tmp_path / f"d{other}", numbers=range(40, 48), files=1)
    write_parquet(tmp_path / f"d{odd}", numbers=range(8))
    write_parquet(tmp_path / f"d{odd}", split="test", numbers=range(8, 12), files=1)
    for split, numbers in {"train": range(8), "test": range(8, 12)}.items():
        source = open_source(str(tmp_path / f"d{odd}"), split=split, streaming=streaming)
        assert [row.image for row in read_all(source)] == [png(i) for i in numbers]
        assert source.label_names == NAMES


@pytest.mark.parametrize("odd", ["[1]", "?", "*", "{1..2}", "#"])
def test_tars_and_arrow_files_with_odd_names_are_read(tmp_path, odd):
    path = write_tar(tmp_path / f"d{odd}" / f"a{odd}.tar", samples(range(5)))
    for name in (path, path.parent):
        assert [row.image for row in read_all(open_source(str(name)))] == [png(i) for i in range(5)]
    assert open_source(str(path)).shard_names == [f"a{odd}.tar"]


def test_a_pattern_is_one_unless_something_has_its_very_name(tmp_path):
    write_files(tmp_path, images("a1.png", "a2.png"))
    for pattern in ("a[12].png", "a{1..2}.png", "a?.png", "**/a*.png"):
        assert len(open_source(str(tmp_path / pattern))) == 2
        if "/" not in pattern:
            write_files(tmp_path, {pattern: png(9)})
            assert [row.key for row in read_all(open_source(str(tmp_path / pattern)))] == [pattern]
            (tmp_path / pattern).unlink()


def test_a_url_with_brackets_is_read_if_it_exists(tmp_path):
    write_files(tmp_path / "d", images("a[1]/x[2].png", "a[1]/y?.png"))
    url = upload(tmp_path / "d")
    assert [row.key for row in read_all(open_source(f"{url}/a[1]"))] == ["x[2].png", "y?.png"]
    assert [row.image for row in read_all(open_source(f"{url}/a[1]/x[2].png"))] == [png(0)]


# ------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("where", ["local", "url"])
@pytest.mark.parametrize(
    ("training", "evaluation", "name"),
    [
        *[("training", "testing", "test"), ("Train", "VAL", "validation"), ("TRAIN", "dev", "validation")],
        *[("train", "Evaluation", "test"), ("train", "eval", "test"), ("train", "valid", "validation")],
    ],
)
def test_split_folders_have_the_names_that_datasets_knows(tmp_path, caplog, training, evaluation, name, where):
    files = images(
        *(f"{split}/{label}/{i}.png" for split in (training, evaluation) for label in "ab" for i in range(3))
    )
    root = write_files(tmp_path / "d", files)
    root = upload(root) if where == "url" else str(root)
    assert splits_of(root) == {"train": 6, name: 6}
    assert labels_of(root) == {key: key.split("/")[1] for key in files if key.startswith(training)}
    assert list(labels_of(root, evaluation)) == [key for key in files if key.startswith(evaluation)]
    rows, eval_rows, _ = open_splits(SplitKeys(dataset=root))
    assert (rows.source.split, eval_rows.source.split) == ("train", name)
    assert unwarned(caplog)


@pytest.mark.parametrize(
    ("layout", "label"),
    [
        *[("images/{split}/{label}/{i}.png", 2), ("{label}/{split}/{i}.png", 0), ("a/b/{split}/{label}/{i}.png", 3)],
        *[("a/{label}/{split}/{i}.png", 1), ("{split}/images/{label}/{i}.png", 2)],
    ],
)
def test_split_folders_may_be_one_or_two_levels_down(tmp_path, layout, label, caplog):
    names = [
        layout.format(split=split, label=one, i=i)
        for split in ("Train", "test")
        for one in ("cat", "dog")
        for i in "123"
    ]
    write_files(tmp_path / "d", images(*names))
    assert splits_of(tmp_path / "d") == {"train": 6, "test": 6}
    for split in ("train", "test"):
        labels = labels_of(tmp_path / "d", split)
        assert labels == {key: key.split("/")[label] for key in sorted(names) if split in key.lower()}
    assert unwarned(caplog)


@pytest.mark.parametrize("folders", [("train_2019", "val_2019"), ("images", "test-a"), ("images", "holdout")])
@pytest.mark.parametrize("prefix", ["", "all/"])
def test_folders_that_look_like_splits_are_named_in_one_warning(tmp_path, caplog, folders, prefix):
    write_files(tmp_path / "d", images(*(f"{prefix}{folder}/{i}.png" for folder in folders for i in range(2))))
    assert splits_of(tmp_path / "d") == {"train": 4}
    (record,) = caplog.records
    alike = [f"{prefix}{folder}" for folder in folders if folder != "images"]
    assert f"look like splits ({', '.join(alike)})" in record.getMessage()
    assert len(open_source(str(tmp_path / "d"), split=alike[-1])) == 2


def test_what_looks_like_a_split():
    for name, split in {
        **{"train2017": "train", "trainA": "train", "TestSet": "test", "test_images": "test", "my-valid": "validation"},
        **{"hold-out": "test", "HeldOut": "test", "evaluation 2": "test", "trainimages": "train"},
    }.items():
        assert like_split(name) == split, name
    for name in ("trains", "contest", "latest", "device", "invalid", "evaluate", "valley", "images"):
        assert like_split(name) is None, name


def test_one_subject_called_test_does_not_make_the_rest_disappear(tmp_path, caplog):
    names = [f"{subject}/{i}.png" for subject in ("sports/training", "sports/other", "home/other") for i in range(2)]
    write_files(tmp_path / "d", images(*names))
    assert splits_of(tmp_path / "d") == {"train": 6}
    assert "look like splits (sports/training)" in caplog.text


def test_images_outside_of_split_folders_are_counted(tmp_path, caplog):
    write_files(tmp_path / "d", images("train/1.png", "test/1.png", "extra/1.png", "extra/2.png", "logo.png"))
    assert splits_of(tmp_path / "d") == {"train": 1, "test": 1}
    assert "files outside of them are left out: 3, first extra/1.png" in caplog.text


@pytest.mark.parametrize("streaming", [True, None])
@pytest.mark.parametrize(
    ("training", "test"), [("Train/{}", "TEST/{}"), ("TRAIN_{}", "Test_{}"), ("train/{}", "test/{}")]
)
def test_shards_have_splits_in_any_case(tmp_path, training, test, streaming):
    shard = write_parquet(tmp_path / "p", numbers=range(6), files=1) / "train-00000-of-00001.parquet"
    other = write_parquet(tmp_path / "q", numbers=range(6, 9), files=1) / "train-00000-of-00001.parquet"
    write_files(
        tmp_path / "d", {training.format("a.parquet"): shard.read_bytes(), test.format("a.parquet"): other.read_bytes()}
    )
    for root in (str(tmp_path / "d"), upload(tmp_path / "d")):
        for split, numbers in {"train": range(6), "test": range(6, 9)}.items():
            source = open_source(root, split=split, streaming=streaming)
            assert [row.image for row in read_all(source)] == [png(i) for i in numbers]


def test_shards_that_datasets_leaves_out_or_mixes_are_named(tmp_path, caplog):
    write_tar(tmp_path / "d" / "train" / "a.tar", samples(range(3)))
    write_tar(tmp_path / "d" / "Test" / "b.tar", samples(range(3)))
    assert splits_of(tmp_path / "d") == {"train": 1}
    assert "files outside of them are left out: 1, first Test/b.tar" in caplog.text
    caplog.clear()
    write_tar(tmp_path / "e" / "train-0.tar", samples(range(3)))
    write_tar(tmp_path / "e" / "test-0.tar", samples(range(3)))
    assert splits_of(tmp_path / "e" / "*.tar") == {"train": 2}
    assert "is read as one split, although its files are called 1 test, 1 train" in caplog.text


# ------------------------------------------------------------------------------------------ links and special files


def test_folders_that_link_to_each_other_are_read_once(tmp_path, caplog):
    root = write_files(tmp_path / "d", images("a/1.png", "b/2.png"))
    (root / "a" / "to_b").symlink_to(root / "b")
    (root / "b" / "to_a").symlink_to(root / "a")
    (root / "up").symlink_to(tmp_path)
    assert labels_of(root) == {"a/1.png": "a", "b/2.png": "b"}
    (record,) = caplog.records
    assert (
        "left out: 1 link to a folder above (up), 2 links to folders that are read already (first a/to_b)"
        in record.message
    )
    assert len(open_source(f"{root}/**/*.png")) == 2


def test_shards_below_folders_that_link_to_each_other_are_read_once(tmp_path):
    root = write_parquet(tmp_path / "d" / "a", numbers=range(4), files=1).parent
    write_parquet(root / "b", split="test", numbers=range(3), files=1)
    (root / "a" / "to_b").symlink_to(root / "b")
    (root / "b" / "to_a").symlink_to(root / "a")
    os.mkfifo(root / "a" / "train-pipe.parquet")
    assert splits_of(root) == {"train": 1, "test": 1}


def test_special_files_and_broken_links_are_counted_and_never_opened(tmp_path, caplog, monkeypatch):
    root = write_files(tmp_path / "d", images("a/1.png", "b/2.png"))
    os.mkfifo(root / "pipe.png")
    monkeypatch.chdir(root)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("s.png")
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "gone.png").symlink_to(tmp_path / "gone")
    (root / "self.png").symlink_to(root / "self.png")
    assert list(labels_of(root)) == ["a/1.png", "b/2.png"]
    said = "1 FIFO (pipe.png)", "1 socket (s.png)", "1 device (zero.png)", "2 links that lead nowhere (first "
    assert all(part in caplog.records[0].message for part in said)
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(DataError, match="is not a regular file or folder"):
            locate(DataKeys(dataset=str(root / name)))
    assert len(open_source(f"{root}/*/*.png")) == 2


def test_a_folder_that_cannot_be_read_is_counted(tmp_path, caplog, monkeypatch):
    root = write_files(tmp_path / "d", images("a/1.png", "b/2.png"))
    scan = os.scandir  # root may read everything, so the refusal is a made-up one

    def refuse(path):
        if str(path).rstrip("/").endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert splits_of(root) == {"train": 1}
    assert "1 folder or link that can't be read (b)" in caplog.text
    with pytest.raises(DataError, match=r"cannot read .*/b: .*Permission denied.*; check the folder"):
        locate(DataKeys(dataset=str(root / "b")))


def test_a_file_is_read_once_in_each_split_under_its_own_name(tmp_path, caplog):
    root = write_files(tmp_path / "d", images("z.png", "y.png"))
    write_files(tmp_path, {"outside.png": png(7)})
    (root / "a.png").symlink_to(root / "z.png")
    for name in ("b.png", "c.png"):
        (root / name).symlink_to(tmp_path / "outside.png")
    os.link(root / "y.png", root / "hard.png")
    # A hard link is a file of its own, as a copy is.
    assert [row.key for row in read_all(open_source(str(root)))] == ["b.png", "hard.png", "y.png", "z.png"]
    assert "2 links to files that are read already (first a.png)" in caplog.text
    for split in ("train", "val"):
        (root / split).mkdir()
        (root / split / "1.png").symlink_to(root / "z.png")
    assert splits_of(root) == {"train": 1, "validation": 1}


def test_splits_that_are_links_keep_their_names(tmp_path):
    root = write_files(tmp_path / "d", images("all/1.png", "more/2.png"))
    (root / "train").symlink_to(root / "all")
    (root / "test").symlink_to(root / "more")
    assert splits_of(root) == {"train": 1, "test": 1}


# ------------------------------------------------------------------------------------------ other files


def test_images_of_other_formats_are_counted_by_ending(tmp_path, caplog):
    root = write_files(
        tmp_path / "d", images("a/1.jpg", "a/2.jpg", "b/1.HEIC", "b/2.heic", "b/3.raw", "b/x.txt", "README")
    )
    assert splits_of(root) == {"train": 2}
    (record,) = caplog.records
    assert record.message == f"{root}: left out: 2 .heic files (first b/1.HEIC), 1 .raw file (b/3.raw)"
    write_files(tmp_path / "e", images("b/1.HEIC", "b/2.heic", "c.rar"))
    with pytest.raises(
        DataError, match=r"it holds 2 \.heic files \(first b/1\.HEIC\), 1 \.rar file \(c\.rar\); convert"
    ):
        locate(DataKeys(dataset=str(tmp_path / "e")))


@pytest.mark.parametrize("stray", ["logo.png", ".DS_Store", "Thumbs.db", "._1.png", "__MACOSX/a/._1.png", "readme.txt"])
def test_a_stray_file_leaves_the_labels(tmp_path, caplog, stray):
    names = [f"{label}/{i}.png" for label in "ab" for i in range(3)]
    write_files(tmp_path / "d", images(*names, stray))
    assert labels_of(tmp_path / "d") == {name: name[0] for name in names}
    said = "images of split train that are in none of its class folders: 1 (first logo.png); they are left out"
    assert (said in caplog.text) == (stray == "logo.png")
    assert unwarned(caplog) == (stray != "logo.png")


def test_one_deep_image_in_a_hundred_is_a_stray_and_more_take_the_labels_aloud(tmp_path, caplog):
    names = [f"{label}/{i:02d}.png" for label in "ab" for i in range(50)]
    write_files(tmp_path / "d", images(*names, "a/deep/1.png"))
    assert labels_of(tmp_path / "d") == {name: name[0] for name in names}
    write_files(tmp_path / "d", images("a/deep/2.png"))
    assert set(labels_of(tmp_path / "d").values()) == {None}
    assert "in none of its class folders: 2 (first a/deep/1.png); no image has a label" in caplog.text


def test_an_unlabelled_split_does_not_take_the_labels_of_another(tmp_path):
    write_files(tmp_path / "d", images("train/a/1.png", "train/b/1.png", *(f"test/{i}.png" for i in range(5))))
    assert labels_of(tmp_path / "d") == {"train/a/1.png": "a", "train/b/1.png": "b"}
    assert set(labels_of(tmp_path / "d", "test").values()) == {None}


# ------------------------------------------------------------------------------------------ outputs inside the data


@pytest.mark.parametrize("command", ["pretrain", "pretrain eval", "finetune", "prepare", "embed"])
def test_output_inside_the_data_is_refused_in_one_line(tmp_path, capsys, command):
    root, other = (write_files(tmp_path / name, images("a/1.png", "b/2.png")) for name in ("d", "other"))
    (tmp_path / "link").symlink_to(root)
    out = tmp_path / "link" / "out"
    data, written = ["--dataset", str(root)], ["--output_dir", str(out)]
    if command == "prepare":
        message = mistake(capsys, command, str(root), str(out))
    elif command == "embed":
        with pytest.raises(DataError) as caught:
            locate(EmbedRecipe(model="m", dataset=str(root), output=f"{out}/x.parquet"))
        message = str(caught.value)
    elif command == "finetune":
        with pytest.raises(DataError) as caught:
            open_splits(load_finetune_recipe(["--model", "m", *data, *written]))
        message = str(caught.value)
    else:
        data = ["--dataset", str(other), "--eval_dataset", str(root)] if "eval" in command else data
        message = mistake(capsys, "pretrain", "--recipe", "quickstart", *data, *written)
    assert re.fullmatch(
        rf"output\S* {out}\S* lies inside the data set {root}, and [^\n]*; name a place outside", message
    )
    assert not out.exists()


def test_output_beside_the_data_is_written(tmp_path):
    root = write_files(tmp_path / "d", images("a/1.png", "b/2.png"))
    locate(EmbedRecipe(model="m", dataset=str(root), output=str(tmp_path / "d.parquet")))
    locate(EmbedRecipe(model="m", dataset=str(root / "a" / "1.png"), output=str(root / "d.parquet")))
    with pytest.raises(DataError, match="lies inside the data set"):
        locate(EmbedRecipe(model="m", dataset=f"{root}/**/*.png", output=str(root / "d.parquet")))


def test_the_folder_of_an_older_run_is_not_read(tmp_path, caplog):
    pictures = images("a/1.png", "b/2.png", "run/reconstructions/1.png") | {"run/run_config.yaml": b""}
    assert labels_of(write_files(tmp_path / "d", pictures)) == {"a/1.png": "a", "b/2.png": "b"}
    assert "left out: 1 output folder of a run (run)" in caplog.text
    assert splits_of(tmp_path / "d" / "run") == {"train": 1}


# ------------------------------------------------------------------------------------------ archives


def archive(path, files: dict[str, bytes]):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as opened:
            for name, data in files.items():
                opened.writestr(name, data)
        return path
    with tarfile.open(path, "w:" + {".xz": "xz", ".BZ2": "bz2"}.get(path.suffix, "gz")) as opened:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("ending", ["zip", "ZIP"])
def test_a_zip_of_images_is_read_as_file_folder_and_url(tmp_path, ending, caplog):
    files = images("a/1.png", "b/2.png", "b/3.png")
    path = archive(tmp_path / "d[1]" / "x.zip", files).rename(tmp_path / "d[1]" / f"x.{ending}")
    plain = write_files(tmp_path / "u", {path.name: path.read_bytes()})
    for name in (path, path.parent, plain, url := upload(plain), f"{url}/{path.name}"):
        assert sorted(row.image for row in read_all(open_source(str(name)))) == sorted(files.values())
    assert "class folders inside archives are not read as labels; unpack them" in caplog.text


def test_zips_have_splits(tmp_path):
    archive(tmp_path / "d" / "train.zip", images("1.png", "2.png"))
    archive(tmp_path / "d" / "Test.zip", {"3.png": png(3)})
    assert splits_of(tmp_path / "d") == {"train": 1, "test": 1}
    assert [row.image for row in read_all(open_source(str(tmp_path / "d"), split="test"))] == [png(3)]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.xz", "x.TAR.BZ2"])
def test_a_compressed_tar_says_what_to_do(tmp_path, name, caplog):
    path = archive(tmp_path / "d" / name, images("1.png"))
    with pytest.raises(DataError, match=r"matches \.\S+ files; give one kind: .*, and unpack archives of other kinds$"):
        locate(DataKeys(dataset=str(path)))
    for root in (str(path.parent), upload(path.parent)):
        with pytest.raises(DataError, match=rf"it holds 1 \.\S+ file \({name}\); .*, and unpack archives$"):
            locate(DataKeys(dataset=root))
    write_files(tmp_path / "d", images("1.png"))
    assert splits_of(tmp_path / "d") == {"train": 1}
    assert f"file ({name})" in caplog.text


def test_a_tar_of_archives_says_what_to_do(tmp_path):
    inner = write_tar(tmp_path / "n01.tar", samples(range(3))).read_bytes()
    for name in ("n01.tar", "n01.tar.gz", "n01.zip"):
        path = write_tar(tmp_path / "d" / "all.tar", [(name, inner), (f"more/{name}", inner)])
        for given in (path, path.parent):
            with pytest.raises(DataError, match=r"all\.tar holds archives \(.*\), not images; unpack it"):
                open_source(str(given))


def test_samples_of_a_tar_without_an_image_that_can_be_read_are_counted(tmp_path, caplog):
    members = [("1.png", png(1)), ("2.HEIC", b"x"), ("3.HEIC", b"x"), ("readme.txt", b"x")]
    assert len(open_source(str(write_tar(tmp_path / "a.tar", members)))) == 1
    assert "a.tar: left out: 2 .heic files (first *.heic)" in caplog.text
