"""Runs that are killed, by SIGKILL, at random moments and inside every file that a save writes: nothing is lost."""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ends, fork, last_step
from runs import arguments, checkpoints, environment, losses, weights_hash

from hf_mae import files
from hf_mae.training import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")]

OPTIONS = {"total_steps": 140, "save_steps": 4, "eval_steps": 70, "num_workers": 1, "resume": "auto"}
CHECKPOINT_FILES = (
    "config.json", "model.safetensors", "preprocessor_config.json", "optimizer.safetensors", "trainer.json",
    "data.json", "COMPLETE",
)  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cut(folder: Path, name: str, share: float) -> None:
    """Leave a folder as if the process had died inside this file: it is cut, and the later ones are not there."""
    files = sorted(folder.iterdir(), key=lambda file: (file.stat().st_mtime_ns, file.name == "COMPLETE"))
    at = [file.name for file in files].index(name)
    for later in files[at + 1 :]:
        later.unlink()
    os.truncate(folder / name, int(share * files[at].stat().st_size))


def dies_inside(name: str, share: float) -> Callable[[], None]:
    """A change of this process: its next checkpoint kills it while it writes a file."""

    def change() -> None:
        seal = checkpoint._seal

        def cut_and_die(folder: Path) -> None:
            if name == "COMPLETE":
                seal(folder)
            cut(folder, name, share)
            die()

        checkpoint._seal = cut_and_die

    return change


def dies_at(module, function: str, call: int) -> Callable[[], None]:
    """A change of this process: it is killed where it calls a function for the `call`-th time."""

    def change() -> None:
        original, calls = getattr(module, function), []

        def counted(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                die()
            return original(*args, **kwargs)

        setattr(module, function, counted)

    return change


@pytest.fixture(scope="module", params=[1, 2])
def whole(request, tmp_path_factory):
    """A run that nothing happens to, and its number of processes."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    assert set(ends(fork(output_dir, request.param, **OPTIONS))) == {0}
    return output_dir, request.param


def check_the_same(output_dir: Path, whole: Path) -> None:
    assert weights_hash(output_dir) == weights_hash(whole)
    assert losses(output_dir) == losses(whole)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert files.sha256(output_dir / "checkpoint-140" / name) == files.sha256(whole / "checkpoint-140" / name)
    assert not [path for path in output_dir.iterdir() if path.name.startswith(".tmp")]


def test_ten_kills_at_random_moments_change_nothing_about_the_weights(whole, tmp_path):
    whole, ranks = whole
    output_dir, moments, kills = tmp_path / "run", random.Random(ranks), 0
    while kills < 10:
        before = last_step(output_dir)
        pids = fork(output_dir, ranks, **OPTIONS)
        deadline = time.monotonic() + 60
        # Any moment of a run that gets on: while it starts, steps, evaluates or saves.
        target = before + moments.randrange(0, 9)
        while last_step(output_dir) < target and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.08))
        victim = moments.choice(pids)
        os.kill(victim, signal.SIGKILL)
        assert ends(pids)[pids.index(victim)] == -signal.SIGKILL
        assert last_step(output_dir) < 140, "the run was over before it could be killed ten times"
        kills += 1
    assert set(ends(fork(output_dir, ranks, **OPTIONS))) == {0}
    check_the_same(output_dir, whole)


def test_a_kill_inside_each_file_of_a_save_changes_nothing_about_the_weights(whole, tmp_path):
    whole, ranks = whole
    output_dir = tmp_path / "run"
    shares = random.Random(ranks)
    changes = [dies_inside(name, shares.choice([0, 0.5, 1])) for name in CHECKPOINT_FILES]
    # Between the parts of a save: when the new one is in place and the old one not removed; in the middle of removing
    # it; and of removing what the kill before has left.
    changes += [dies_half_way_through_removing("checkpoint-")]
    changes += [dies_at(files, "fsync", call) for call in (8, 9, 1)]
    changes += [dies_half_way_through_removing(".tmp-checkpoint-")]
    for change in changes:
        before = checkpoints(output_dir)
        codes = ends(fork(output_dir, ranks, change, **OPTIONS))
        assert codes[0] == -signal.SIGKILL
        complete = checkpoint.find_checkpoint(output_dir, "auto")
        assert not before or complete  # the one before is still there
    # And while the end of the run is written, beside the last checkpoint.
    for change in (dies_at(files, "replace_files", 1), dies_at_end(1), dies_at_end(2)):
        codes = ends(fork(output_dir, ranks, change, **OPTIONS))
        assert codes[0] == -signal.SIGKILL
        assert max(checkpoints(output_dir)) == 140
    assert set(ends(fork(output_dir, ranks, **OPTIONS))) == {0}
    check_the_same(output_dir, whole)


def dies_half_way_through_removing(kind: str) -> Callable[[], None]:
    """Killed when half of a folder is removed whose name begins so."""

    def change() -> None:
        remove = shutil.rmtree

        def remove_half(path, **options) -> None:
            if not Path(path).name.startswith(kind):
                return remove(path, **options)
            files = sorted(Path(path).iterdir())
            for file in files[: len(files) // 2]:
                file.unlink()
            return die()

        checkpoint.shutil.rmtree = remove_half

    return change


def dies_at_end(call: int) -> Callable[[], None]:
    """Killed as the `call`-th file of the final model is put in place."""

    def change() -> None:
        replace_files = files.replace_files

        def replace_some(folder: Path, write: Callable[[Path], None]) -> None:
            dies_at(Path, "replace", call)()
            replace_files(folder, write)

        files.replace_files = replace_some

    return change


# ------------------------------------------------------------------------------------------ a disk that is full

ON_A_SMALL_DISK = """
set -eu
mount -t tmpfs -o size={size} tmpfs disk
code=0; {run} > first 2>&1 || code=$?; echo $code > codes
ls disk/run > left
{python} -c "{verify}" >> left
mount -o remount,size=100m disk
code=0; {run} > second 2>&1 || code=$?; echo $code >> codes
cp -r disk/run run
"""
VERIFY = "from hf_mae.training.checkpoint import *; verify_checkpoint(Path('disk/run/checkpoint-8')); print('whole')"


def test_a_full_disk_is_reported_and_costs_no_checkpoint_and_the_run_resumes(tmp_path):
    mounting = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*mounting, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let a user mount a file system of his own (unshare --user --mount)")
    options = {**OPTIONS, "total_steps": 16, "num_workers": 0}
    assert ends(fork(tmp_path / "whole", 1, **options)) == [0]
    size = sum(file.stat().st_size for file in (tmp_path / "whole" / "checkpoint-16").iterdir())
    (tmp_path / "disk").mkdir()
    words = [sys.executable, "-m", "hf_mae.cli", *arguments("disk/run", **options)]
    script = ON_A_SMALL_DISK.format(
        size=int(2.6 * size), run=shlex.join(words), python=shlex.quote(sys.executable), verify=VERIFY
    )
    result = subprocess.run(
        [*mounting, "sh", "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "codes").read_text().split() == ["2", "0"]
    first = (tmp_path / "first").read_text()
    assert "WARNING: there is no room for disk/run/checkpoint-12" in first
    assert "hf-mae: error: there is no room for disk/run/checkpoint-16" in first.splitlines()[-1]
    left = (tmp_path / "left").read_text().split()
    assert left[-1] == "whole"
    assert {"checkpoint-4", "checkpoint-8"} == {name for name in left if name.startswith("checkpoint-")}
    assert weights_hash(tmp_path / "run") == weights_hash(tmp_path / "whole")


def test_what_the_kills_leave_behind_is_cut(tmp_path):
    """The changes above do what they say."""
    for name in ("first", "second", "third"):
        (tmp_path / name).write_text("content")
        time.sleep(0.01)
    cut(tmp_path, "second", 0.5)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"first": "content", "second": "con"}
    shutil.rmtree(tmp_path)
