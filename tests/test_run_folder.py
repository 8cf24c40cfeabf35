"""The files of a run's folder: what is written comes back, and what a crash or another program left does no harm."""

import errno
import itertools
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image
from runs import arguments, environment, evaluations, losses, run, start, weights_hash

from hf_mae import run_folder
from hf_mae.errors import DataError, UserError
from hf_mae.hub.push import stage
from hf_mae.run_folder import RunFolder, add_result, append_bad_sample, curve, read_results, run_of

EVENTS = [{"step": 0, "eval_loss": 1.5}, {"step": 10, "loss": 0.5, "grad_norm": None}, {"step": 20, "loss": 0.25}]
BAD = [{"key": "a.jpg", "reason": "Truncated"}, {"key": "b.jpg", "reason": "Empty"}]
CONFIG = ({"dataset": "digits", "seed": 0}, {"total_steps": 20})
CONVERSION = {"licence": "cc-by-nc-4.0", "source": "x.pth"}


DATA = {"dataset": "d", "evaluated_on": "test", "eval_images": 5, "classes": 2}


def entry(name="knn", sha256="0" * 64):
    return {
        "protocol": {"name": name}, "data": DATA,
        "checkpoint": {"path": "out", "sha256": sha256}, "figures": {"knn_top1": 51.25},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Every file of a run, as a run writes it."""
    found = RunFolder(tmp_path / "run")
    found.write_config(*CONFIG)
    for event in EVENTS:
        found.append_event(event)
    found.write_bad_samples(BAD)
    add_result(found.results_file, entry())
    found.conversion_file.write_text(json.dumps(CONVERSION))
    for step in (0, 10, 5):
        found.save_picture(step, Image.new("RGB", (4, 4)))
    return found


def everything(folder):
    return {
        "run_config.yaml": folder.config(), "metrics.jsonl": folder.events(), "bad_samples.jsonl": folder.bad_samples(),
        "results.json": folder.results(), "conversion.json": folder.conversion(),
        "reconstructions": [step for step, _ in folder.pictures()],
    }  # fmt: skip


WHOLE = {
    "run_config.yaml": CONFIG, "metrics.jsonl": EVENTS, "bad_samples.jsonl": BAD, "results.json": [entry()],
    "conversion.json": CONVERSION, "reconstructions": [0, 5, 10],
}  # fmt: skip
NOTHING = {
    "run_config.yaml": ({}, {}), "metrics.jsonl": [], "bad_samples.jsonl": [], "results.json": [],
    "conversion.json": {}, "reconstructions": [],
}  # fmt: skip
FILES = [name for name in WHOLE if name != "reconstructions"]


def test_what_is_written_comes_back_without_a_warning(folder, caplog):
    assert everything(folder) == WHOLE
    assert caplog.messages == []
    assert not [path for path in folder.path.rglob("*") if path.name.startswith(".")]


def test_a_folder_that_does_not_exist_is_read_as_empty(tmp_path, caplog):
    assert everything(RunFolder(tmp_path / "nowhere")) == NOTHING
    assert RunFolder(tmp_path / "nowhere").checkpoints() == []
    assert caplog.messages == []


def test_reading_needs_neither_torch_nor_transformers():
    code = """import sys
sys.argv = ["hf-mae"]  # so that importing the package registers nothing
import hf_mae.run_folder
heavy = {"torch", "transformers", "numpy", "PIL"} & sys.modules.keys()
assert not heavy, heavy"""
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x00\xff\xfe\n\x81", b"3\n", b'"text"\n', b"[[1, 2], null]\n", b"[" * 100_000],
    ids=["empty", "bytes", "a number", "a word", "a list", "deeply nested"],
)
def test_a_file_that_holds_something_else_is_read_as_absent(folder, caplog, name, content):
    (folder.path / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = everything(folder)
    assert found == {**WHOLE, name: NOTHING[name]}
    assert len(caplog.messages) <= 1
    assert all(str(folder.path / name) in message for message in caplog.messages)
    assert len(caplog.messages) == 1 or not content


@pytest.mark.parametrize("name", FILES)
def test_a_fifo_is_read_as_absent_and_its_writer_is_not_waited_for(folder, caplog, name):
    (folder.path / name).unlink()
    os.mkfifo(folder.path / name)
    assert everything(folder) == {**WHOLE, name: NOTHING[name]}
    (message,) = caplog.messages
    assert f"{folder.path / name} is not a regular file" in message


def test_results_are_not_added_to_a_fifo_or_a_device(folder):
    os.mkfifo(folder.path / "fifo")
    for path in (folder.path / "fifo", Path("/dev/full")):
        with pytest.raises(DataError, match=f"{path} is not a list of results of hf-mae"):
            read_results(path)


def test_a_full_disk_costs_the_names_of_bad_images_and_one_line(folder, caplog, monkeypatch):
    def fail(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_folder, "write_text", fail)
    folder.write_bad_samples([*BAD, *BAD])
    (message,) = caplog.messages
    assert message.startswith(f"{folder.bad_file} can't be written and is incomplete: ")
    assert "No space left" in message
    assert folder.bad_samples() == BAD
    append_bad_sample(Path("/dev/full"), "a.jpg", "Empty")
    assert "/dev/full can't be written and is incomplete: " in caplog.messages[1]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_read_as_empty_without_a_warning(folder, caplog, name):
    (folder.path / name).unlink()
    assert everything(folder) == {**WHOLE, name: NOTHING[name]}
    assert caplog.messages == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_off_costs_no_more_than_its_end(folder, name):
    content = (folder.path / name).read_bytes()
    for length in range(len(content)):
        (folder.path / name).write_bytes(content[:length])
        found = everything(folder)
        assert {**found, name: None} == {**WHOLE, name: None}
        if name.endswith(".jsonl"):  # all whole lines
            kept = content[:length].count(b"\n")
            assert found[name] in (WHOLE[name][:kept], WHOLE[name][: kept + 1])


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 7, "lo',
        b"3",
        b"[]",
        b"null",
        b'{"loss": 1.0}',
        b'{"step": "7"}',
        b'{"step": true}',
        b"\x80\x00",
        b'{"step": -5}',
        b'{"step": 1%s}' % (b"0" * 30),
        b'{"step": 1%s}' % (b"0" * 5000),
    ],
)
def test_lines_of_a_log_that_are_no_events_are_skipped_with_one_warning(folder, caplog, line):
    lines = folder.metrics_file.read_bytes().splitlines()
    folder.metrics_file.write_bytes(b"\n".join([lines[0], line, b"", lines[1], line, lines[2], line]))
    assert folder.events() == EVENTS
    (message,) = caplog.messages
    assert f"{folder.metrics_file}: 3 lines skipped" in message


@pytest.mark.parametrize("line", [b'{"key": "c.jpg"', b"3", b'{"key": "c.jpg"}', b'{"key": 1, "reason": "x"}', b"\xff"])
def test_lines_that_name_no_image_are_skipped_with_one_warning(folder, caplog, line):
    folder.bad_file.write_bytes(line + b"\n" + folder.bad_file.read_bytes())
    assert folder.bad_samples() == BAD
    assert len(caplog.messages) == 1


def test_an_event_after_a_line_that_was_cut_off_gets_a_line_of_its_own(folder):
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 25, "lo')
    folder.append_event({"step": 30})
    assert folder.events() == [*EVENTS, {"step": 30}]


def test_a_log_is_cut_to_a_step_and_loses_what_is_no_event(folder):
    with folder.metrics_file.open("a") as file:
        file.write('3\n{"step": 5')
    assert folder.cut_events(10) == EVENTS[:2]
    assert [json.loads(line) for line in folder.metrics_file.read_text().splitlines()] == EVENTS[:2]
    assert folder.cut_events(-1) == []
    assert folder.metrics_file.read_text() == ""


def test_a_curve_has_the_numbers_of_a_key():
    events = [{"step": 1, "loss": 2}, {"step": 2, "loss": None}, {"step": 3, "loss": "x"}, {"step": 4}]
    assert curve([*events, {"step": 5, "loss": 0.5}], "loss") == [(1, 2), (5, 0.5)]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1e400", "1e308", "1" + "0" * 400, "true", "[1]", '{"a": 1}'])
def test_what_is_not_a_finite_number_of_usual_size_is_not_in_a_curve(folder, value):
    folder.metrics_file.write_text(f'{{"step": 1, "loss": {value}}}\n{{"step": 2, "loss": -3.4e38}}\n')
    assert curve(folder.events(), "loss") == [(2, -3.4e38)]


@pytest.mark.parametrize("part", ["recipe", "derived"])
def test_a_part_of_the_settings_that_is_no_table_is_skipped(folder, caplog, part):
    settings = {"recipe": CONFIG[0], "derived": CONFIG[1], part: [1, 2]}
    folder.config_file.write_text(yaml.safe_dump(settings))
    expected = ({}, CONFIG[1]) if part == "recipe" else (CONFIG[0], {})
    assert folder.config() == expected
    assert len(caplog.messages) == 1


def test_settings_without_any_table_are_skipped_with_one_warning(folder, caplog):
    folder.config_file.write_text("recipe: null\nderived: 5\n")
    assert folder.config() == ({}, {})
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2024-01-02", "2024-01-02"), ("!!binary aGk=", "b'hi'"), ("!!set {a}", "{'a'}"), ("{1: 2}", {"1": 2}),
        ('"\\uD800"', "\ud800"), ("[1.5, null, true]", [1.5, None, True]),
    ],
)  # fmt: skip
def test_settings_of_any_kind_are_read_as_json_has_them(folder, caplog, written, read):
    folder.config_file.write_text(f"recipe: {{dataset: {written}}}\n")
    assert folder.config() == ({"dataset": read}, {})
    assert caplog.messages == []


@pytest.mark.parametrize(
    "text",
    [
        "recipe: &a {dataset: *a}", "recipe: {seed: 0x" + "9" * 5000 + "}", "recipe: {seed: " + "9" * 5000 + "}",
        "recipe: {? [a, b] : 1}", "recipe: {seed: 2024-13-45}", "{a: " * 3000,
        "a: &a [x]\n" + "".join(f"{b}: &{b} [{f'*{a},' * 20}]\n" for a, b in itertools.pairwise("abcdefghij")),
    ],
    ids=["itself", "hexadecimal", "decimal", "key", "no date", "deep", "laughs"],
)  # fmt: skip
def test_settings_that_nothing_can_be_done_with_make_none_and_quickly(folder, caplog, text):
    folder.config_file.write_text(text)
    started = time.perf_counter()
    assert folder.config() == ({}, {})
    assert time.perf_counter() - started < 20
    assert len(caplog.messages) == 1


def test_a_folder_that_cannot_be_made_is_one_line():
    with pytest.raises(UserError, match=r"/dev/null/x can't be written .*; name another --output_dir, or make room"):
        RunFolder("/dev/null/x").write_config(*CONFIG)


def test_settings_that_name_python_objects_make_none(folder, caplog):
    folder.config_file.write_text("recipe: !!python/object/apply:os.getcwd []\n")
    assert folder.config() == ({}, {})
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("harm", ["final", "no number", "empty", "cut", "text", "a folder"])
def test_pictures_that_are_not_ours_or_not_whole_are_skipped_with_one_warning(folder, caplog, harm):
    whole = folder.picture_file(0).read_bytes()
    names = {"final": "step-final.png", "no number": "step-.png"}
    path = folder.picture_folder / names.get(harm, "step-20.png")
    if harm == "a folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-5], "text": b"not an image"}.get(harm, whole))
    assert [step for step, _ in folder.pictures()] == [0, 5, 10]
    (message,) = caplog.messages
    assert path.name in message


def test_pictures_of_later_steps_are_removed_whole_or_not_and_others_stay(folder):
    for name in ("step-final.png", "step-7.png", "notes.txt"):
        (folder.picture_folder / name).write_text("text")
    (folder.picture_folder / "step-8.png").mkdir()
    folder.remove_pictures(5)
    left = {path.name for path in folder.picture_folder.iterdir()}
    assert left == {"step-0.png", "step-5.png", "step-8.png", "step-final.png", "notes.txt"}
    folder.remove_pictures(-1)
    assert [step for step, _ in folder.pictures()] == []


def test_a_picture_that_cannot_be_saved_leaves_the_old_one(folder):
    class Broken:
        def save(self, path):
            path.write_bytes(b"half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        folder.save_picture(0, Broken())
    assert [step for step, _ in folder.pictures()] == [0, 5, 10]
    assert len(list(folder.picture_folder.iterdir())) == 3


# ------------------------------------------------------------------------------------------ results.json

FOREIGN = ["", "precious", "{}", "[1, 2]", '[{"a": 1}]', "3", "null", "\udc80"]


@pytest.mark.parametrize("text", FOREIGN)
def test_a_foreign_file_of_results_is_an_error_for_who_adds_to_it(folder, text):
    folder.results_file.write_bytes(text.encode(errors="surrogateescape"))
    before = folder.results_file.read_bytes()
    remedy = "is not a list of results of hf-mae; move it away, or name another file"
    for action in (read_results, lambda path: add_result(path, entry("linear_probe"))):
        with pytest.raises(DataError, match=re.escape(f"{folder.results_file} {remedy}")):
            action(folder.results_file)
    assert folder.results_file.read_bytes() == before
    assert folder.results() == []


def test_entries_that_a_card_cannot_use_are_left_out_of_it(folder, caplog):
    for part, value in (
        ("protocol", {}), ("data", {"dataset": "d"}), ("checkpoint", 3), ("figures", {"knn_top1": "high"}),
        ("figures", {"knn_top1": 10**400}), ("figures", {"knn_top1": math.nan}), ("figures", {"knn_top1": True}),
        ("data", {**DATA, "train_images": None}), ("data", {**DATA, "train_images": "many"}),
        ("data", {**DATA, "eval_images": True}), ("data", {**DATA, "classes": -1}), ("data", {**DATA, "config": ["a"]}),
        ("data", {**DATA, "revision": 5}), ("ranges", None), ("ranges", [1, 2]), ("ranges", {"knn_top1": None}),
        ("intervals", {"knn_top1": 1}), ("per_class", []), ("per_class", {"cat": None}),
        ("per_class", {"cat": {"support": -1, "figures": {}, "intervals": {}}}),
        ("per_class", {"cat": {"support": 1, "figures": {"ap": "a"}, "intervals": {"ap": [0, 1]}}}),
        ("per_class", {"cat": {"support": 1, "figures": {"ap": 1}, "intervals": {}}}),
        ("ranges", {"knn_top1": [1]}), ("ranges", {"knn_top1": "ab"}), ("ranges", {"knn_top1": ["a", "b"]}),
    ):  # fmt: skip
        caplog.clear()
        folder.results_file.write_text(json.dumps([{**entry("other"), part: value}, entry()]))
        assert folder.results() == [entry()]
        assert len(read_results(folder.results_file)) == 2  # and yet nobody's figures are thrown away
        assert len(caplog.messages) == 1


def test_a_result_takes_the_place_of_the_same_measurement_of_the_same_weights(folder):
    add_result(folder.results_file, entry("linear_probe"))
    again = {**entry(), "figures": {"knn_top1": 60.0}}
    add_result(folder.results_file, again)
    assert read_results(folder.results_file) == [entry("linear_probe"), again]


@pytest.mark.slow
def test_results_that_two_processes_add_at_once_are_both_there(tmp_path):
    code = """import json, sys
from pathlib import Path
from hf_mae.run_folder import add_result
for number in range(10):
    protocol = {"name": sys.argv[2] + str(number)}
    add_result(Path(sys.argv[1]), {"protocol": protocol, "data": {}, "checkpoint": {}, "figures": {}})
"""
    command = [sys.executable, "-c", code, tmp_path / "results.json"]
    processes = [subprocess.Popen([*command, name], env=environment()) for name in "ab"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found = {result["protocol"]["name"] for result in read_results(tmp_path / "results.json")}
    assert found == {f"{name}{number}" for name in "ab" for number in range(10)}


# ------------------------------------------------------------------------------------------ checkpoints


def test_checkpoints_are_listed_by_number_up_to_a_step(folder):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-10", "checkpoint-best", ".tmp-checkpoint-11"):
        (folder.path / name).mkdir()
    (folder.path / "checkpoint-50").write_text("a file")
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert [path.name for path in folder.checkpoints(last_step=10)] == ["checkpoint-9", "checkpoint-10"]
    found, step = run_of(folder.path / "checkpoint-9")
    assert (found.path, step) == (folder.path.resolve(), 9)
    found, step = run_of(folder.path)
    assert (found.path, step) == (folder.path, None)
    (folder.path / "elsewhere").mkdir()
    (folder.path / "checkpoint-11").symlink_to(folder.path / "elsewhere")
    (folder.path / "latest").symlink_to(folder.path / "checkpoint-9")
    for name, number in (("checkpoint-11", 11), ("latest", 9)):
        found, step = run_of(folder.path / name)
        assert (found.path, step) == (folder.path, number)


# ------------------------------------------------------------------------------------------ all of it at once


def damage(folder: RunFolder) -> None:
    """Everything that may be left in the folder of a run."""
    with folder.metrics_file.open("ab") as file:
        file.write(b'3\n{"loss": 1}\n\x80\xff\n{"step": "x"}\n{"step": 11, "los')
    folder.bad_file.write_bytes(b'{"key": "a.jpg", "reason": "Empty"}\n\x80\n{"key": "b')
    folder.results_file.write_text('{"knn": 99}')
    folder.config_file.write_bytes(folder.config_file.read_bytes() + b"\x00: [")
    for name, content in (("step-final.png", "x"), ("step-9.png", ""), ("step-.png", "x"), ("cover.png", "x")):
        (folder.picture_folder / name).write_text(content)
    (folder.path / "checkpoint-old").mkdir()
    (folder.path / "checkpoint-7").mkdir()
    (folder.path / "checkpoint-8").write_text("a file")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run")


def test_a_card_a_push_and_a_report_survive_everything_at_once(tmp_path, capsys):
    folder = RunFolder(run(tmp_path / "run"))
    damage(folder)
    assert start("card", folder.path, tmp_path / "card.md") == 0
    text = (tmp_path / "card.md").read_text()
    assert "after step 12" in text
    assert "## Training" not in text  # the settings can't be read
    assert (tmp_path / "card.png").read_bytes() == folder.picture_file(12).read_bytes()
    card = stage(folder.path, tmp_path / "staged", "user/name")
    assert (tmp_path / "staged" / "README.md").read_text() == card.text()
    assert not (tmp_path / "staged" / "recipe.yaml").exists()
    assert start("report", folder.path, "--output", tmp_path / "report.html") == 0
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"after step (\d+)<", page) == ["0", "6", "12"]
    assert "a.jpg" in page


def test_names_that_are_not_utf8_and_entries_that_are_none_survive_a_card_and_a_report(whole, tmp_path, capsys, caplog):
    caplog.set_level(logging.CRITICAL)  # pytest-xdist can't send warnings with such names to its main process
    folder = RunFolder(tmp_path / os.fsdecode(b"r\xff"))
    shutil.copytree(whole, folder.path)
    settings = {"recipe": {"dataset": "\ud800", "model": "a" * 5000, "seed": 5}, "derived": {"hardware": "\udc00"}}
    folder.config_file.write_text(yaml.safe_dump(settings))
    folder.write_bad_samples([{"key": os.fsdecode(b"\xfe.png"), "reason": "Empty"}])
    odd = {**entry("odd \ud800", weights_hash(folder.path)), "data": {**DATA, "dataset": "a/" + "b" * 5000}}
    folder.results_file.write_text(json.dumps([odd, {**odd, "ranges": None}]))
    assert start("card", folder.path, tmp_path / os.fsdecode(b"c\xff.md")) == 0
    text = (tmp_path / os.fsdecode(b"c\xff.md")).read_text()
    assert text.count("**odd \\ud800** on a/bbb") == 1
    assert "| data | \\ud800 (local) |" in text
    shutil.copytree(folder.path, tmp_path / "copy")  # safetensors reads from no other folder
    stage(tmp_path / "copy", tmp_path / "staged", "user/name")
    assert "| hardware | \\udc00 |" in (tmp_path / "staged" / "README.md").read_text()
    capsys.readouterr()
    assert start("report", folder.path, whole, "--output", tmp_path / os.fsdecode(b"r\xff.html")) == 0
    page = (tmp_path / os.fsdecode(b"r\xff.html")).read_text()
    assert "\\udcfe.png" in page
    assert page.count("</span> odd \\ud800</td>") == 1
    assert capsys.readouterr().out.endswith("r\\udcff.html\n")


def test_a_resumed_run_survives_everything_at_once_and_ends_as_the_whole_one(whole, tmp_path, capsys):
    folder = RunFolder(run(tmp_path / "run"))
    shutil.rmtree(folder.path / "checkpoint-12")
    folder.weights_file.unlink()
    damage(folder)
    assert start(*arguments(folder.path, resume="auto")) == 0
    assert weights_hash(folder.path) == weights_hash(whole)
    assert losses(folder.path) == losses(whole)
    assert evaluations(folder.path) == evaluations(whole)
    assert folder.config()[0]["total_steps"] == 12
    assert [step for step, _ in folder.pictures()] == [0, 6, 12]
    assert folder.animation_file.is_file()
    assert folder.bad_samples() == []


def test_one_list_under_two_keys_is_written_and_read_without_references(tmp_path):
    sides = [208, 320]
    RunFolder(tmp_path).write_config({"image_size": sides}, {"size": sides})
    assert "&" not in RunFolder(tmp_path).config_file.read_text()
    assert RunFolder(tmp_path).config() == ({"image_size": sides}, {"size": sides})
