"""Files that are the old or the new one, folders that are complete or absent, and a lock."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment

from hf_mae import files
from hf_mae.errors import UserError

FULL = OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_is_written_and_nothing_else_is_left(tmp_path):
    for text in ("old\n", "new: é\n"):
        files.write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text
    assert names(tmp_path) == ["a.txt"]


def test_what_utf8_cannot_encode_is_written_as_escapes(tmp_path):
    text = os.fsdecode(b"a\xff") + " é" + json.loads('"\\ud800"')
    files.write_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "a\\udcff é\\ud800"
    files.write_json(tmp_path / "a.json", [text])
    assert files.read_json(tmp_path / "a.json") == [text]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    files.write_text(tmp_path / "a.txt", "old")

    def fail_half_way():
        with files.replaced(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise FULL

    with pytest.raises(OSError, match="No space left"):
        fail_half_way()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_comes_back(tmp_path):
    value = {"a": [1, None, "é"], "b": {"c": 0.1}}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    "content", [b"", b'{"a": 1', b"\x80\x00\xff", b"[" * 100_000], ids=["empty", "cut", "bytes", "deep"]
)
def test_what_is_not_json_is_a_value_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"Expecting|codec|deeply"):
        files.read_json(tmp_path / "a.json")


def test_files_of_a_folder_are_replaced_one_by_one(tmp_path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "a").write_text("old")

    def write(folder):
        for name in ("a", "b"):
            (folder / name).write_text("new")
            (folder / name).chmod(0o600)  # as safetensors does

    files.replace_files(tmp_path, write)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"kept": "kept", "a": "new", "b": "new"}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "kept").stat().st_mode)


# ------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("before", ["missing", "empty", "left by a killed process"])
def test_a_new_folder_is_complete(tmp_path, before):
    if before == "empty":
        (tmp_path / "out").mkdir()
    if before == "left by a killed process":
        (tmp_path / ".tmp-out" / "below").mkdir(parents=True)
    files.check_free(tmp_path / "out")
    with files.new_folder(tmp_path / "out") as folder:
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text("content")
        (folder / "below" / "file").chmod(0o600)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "below" / "file").read_text() == "content"
    (tmp_path / "other").write_text("")
    assert (tmp_path / "out" / "below" / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_new_folder_that_fails_is_absent(tmp_path):
    def fail_half_way():
        with files.new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert names(tmp_path) == []


def test_a_new_folder_without_room_is_one_line_with_the_remedy(tmp_path):
    message = r"out can't be written \(.*No space left.*\); name another folder, or make room"
    with pytest.raises(UserError, match=message), files.new_folder(tmp_path / "out"):
        raise FULL
    assert names(tmp_path) == []


def test_an_error_of_reading_inside_a_new_folder_is_not_reported_as_one_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError, match="source"), files.new_folder(tmp_path / "out"):
        (tmp_path / "source").read_text()
    message = r"out can't be written \(.*Is a directory"
    with pytest.raises(UserError, match=message), files.new_folder(tmp_path / "out") as folder:
        folder.write_text("")
    assert names(tmp_path) == []


def test_what_has_no_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/full")):
        with pytest.raises(OSError, match=f"{path} is not a regular file"):
            files.read_json(path)


def test_a_link_is_removed_and_its_target_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dangling", "missing"):
        files.remove(tmp_path / name)
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["file"]
    files.remove(tmp_path / "folder")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_not_empty_is_not_written_over(tmp_path, kind):
    if kind == "file":
        (tmp_path / "out").write_text("mine")
    else:
        (tmp_path / "out" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match="out already exists and is not empty; name another folder by --there"):
        files.check_free(tmp_path / "out", "name another folder by --there")


# ------------------------------------------------------------------------------------------ locks

ADD = """
import json, sys, time
from pathlib import Path
from hf_mae.files import locked, read_json, write_json

path, name = Path(sys.argv[1]), sys.argv[2]
for number in range(20):
    with locked(path):
        found = read_json(path) if path.exists() else []
        time.sleep(0.001)
        write_json(path, [*found, f"{name}{number}"])
"""


@pytest.mark.slow
def test_what_several_processes_add_under_the_lock_is_all_there(tmp_path):
    path = tmp_path / "list.json"
    command = [sys.executable, "-c", ADD, path]
    processes = [subprocess.Popen([*command, name], env=environment()) for name in "abc"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    found = json.loads(path.read_text())
    assert sorted(found) == sorted(f"{name}{number}" for name in "abc" for number in range(20))
    assert names(tmp_path) == ["list.json"]


def test_a_lock_that_is_never_released_is_an_error_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    with files.locked(tmp_path / "a"), pytest.raises(OSError, match="lock"), files.locked(tmp_path / "a"):
        pass


def test_a_path_that_is_missing_is_told_from_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "quickstart").mkdir(parents=True)
    for name in ("mnist", "uoft-cs/cifar10", "timm/vit_base.mae_in1k"):
        assert files.missing_path(name, (".png",)) is None
    assert "check the path" in files.missing_path("./" + 300 * "x")
    close = "there is no file or folder outputs/quikstart; did you mean 'outputs/quickstart'?"
    assert files.missing_path("outputs/quikstart") == close
    assert files.missing_path("output/quickstart/x") == (
        "there is no file or folder output/quickstart/x; did you mean 'outputs'?"
    )
    for name in ("./x", "x.png", "/nowhere", "~nobody/x", "a/b/c", "two words", "a/", "../x", ""):
        assert files.missing_path(name, (".png",)) == f"there is no file or folder {name}; check the path"
