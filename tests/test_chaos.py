"""Runs that are killed, by SIGKILL, at random moments and inside every file that a save writes: nothing is lost.

The runs are forked from this process, which has everything imported, so that a start takes a second.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import arguments, checkpoints, losses, start, weights_hash

from hf_mae.training import checkpoint, pretrain

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")]

OPTIONS = {"total_steps": 90, "save_steps": 4, "eval_steps": 45, "num_workers": 1, "resume": "auto"}
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
    """A change of this process: it is killed where it calls a function for the so-manyeth time."""

    def change() -> None:
        original, calls = getattr(module, function), []

        def counted(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                die()
            return original(*args, **kwargs)

        setattr(module, function, counted)

    return change


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def fork(output_dir: Path, ranks: int, change: Callable[[], None] | None = None, **keys) -> list[int]:
    """Start a run; the process ids of its ranks. The change is made in the first of them."""
    port, pids = free_port(), []
    words = arguments(output_dir, **{**OPTIONS, **keys})
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setsid()
                with (output_dir.parent / f"log-{rank}").open("a") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                if ranks > 1:
                    os.environ |= {
                        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": port,
                        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true",
                    }  # fmt: skip
                if change and rank == 0:
                    change()
                code = start(*words)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # with its loader workers


def ends(pids: list[int], seconds: float = 120) -> list[int]:
    """How the ranks of a run ended; when one was killed, the others are too, as torchrun does it."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] != 0:
                    kill(pids)
        time.sleep(0.01)
    kill(pids)
    assert len(codes) == len(pids), f"not all of {pids} ended: {codes}"
    return [codes[pid] for pid in pids]


def last_step(output_dir: Path) -> int:
    metrics = output_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.fixture(scope="module", params=[1, 2])
def whole(request, tmp_path_factory):
    """A run that nothing happens to, and its number of processes."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    assert set(ends(fork(output_dir, request.param))) == {0}
    return output_dir, request.param


def check_the_same(output_dir: Path, whole: Path) -> None:
    assert weights_hash(output_dir) == weights_hash(whole)
    assert losses(output_dir) == losses(whole)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert checkpoint._sha256(output_dir / "checkpoint-90" / name) == checkpoint._sha256(
            whole / "checkpoint-90" / name
        )
    assert not [path for path in output_dir.iterdir() if path.name.startswith(".tmp")]


def test_ten_kills_at_random_moments_change_nothing_about_the_weights(whole, tmp_path):
    whole, ranks = whole
    output_dir, moments, kills = tmp_path / "run", random.Random(ranks), 0
    while kills < 10:
        before = last_step(output_dir)
        pids = fork(output_dir, ranks)
        deadline = time.monotonic() + 60
        # Any moment of a run that gets on: while it starts, steps, evaluates or saves.
        target = before + moments.randrange(0, 9)
        while last_step(output_dir) < target and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.08))
        victim = moments.choice(pids)
        os.kill(victim, signal.SIGKILL)
        assert ends(pids)[pids.index(victim)] == -signal.SIGKILL
        assert last_step(output_dir) < 90, "the run was over before it could be killed ten times"
        kills += 1
    assert set(ends(fork(output_dir, ranks))) == {0}
    check_the_same(output_dir, whole)


def test_a_kill_inside_each_file_of_a_save_changes_nothing_about_the_weights(whole, tmp_path):
    whole, ranks = whole
    output_dir = tmp_path / "run"
    shares = random.Random(ranks)
    changes = [dies_inside(name, shares.choice([0, 0.5, 1])) for name in CHECKPOINT_FILES]
    # Between the parts of a save: when the new one is in place and the old one not removed; in the middle of removing
    # it, or of removing what an earlier kill has left.
    changes += [dies_at(checkpoint, "_fsync", call) for call in (1, 8, 9)]
    changes += [dies_half_way_through_removing("checkpoint-"), dies_half_way_through_removing(".tmp-checkpoint-")]
    for change in changes:
        before = checkpoints(output_dir)
        codes = ends(fork(output_dir, ranks, change))
        assert codes[0] == -signal.SIGKILL
        complete = checkpoint.find_checkpoint(output_dir, "auto")
        assert not before or complete  # the one before is still there
    # And while the end of the run is written, beside the last checkpoint.
    for call in (1, 2, 3):
        codes = ends(fork(output_dir, ranks, dies_at(pretrain, "replace_files", 1) if call == 1 else dies_at_end(call)))
        assert codes[0] == -signal.SIGKILL
        assert max(checkpoints(output_dir)) == 90
    assert set(ends(fork(output_dir, ranks))) == {0}
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
    """Killed at the so-manyeth file of the final model that is put in place."""

    def change() -> None:
        def replace_some(folder: Path, write: Callable[[Path], None]) -> None:
            dies_at(Path, "replace", call - 1)()
            checkpoint.replace_files(folder, write)

        pretrain.replace_files = replace_some

    return change


def test_what_the_kills_leave_behind_is_cut(tmp_path):
    """The changes above do what they say."""
    for name in ("first", "second", "third"):
        (tmp_path / name).write_text("content")
        time.sleep(0.01)
    cut(tmp_path, "second", 0.5)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"first": "content", "second": "con"}
    shutil.rmtree(tmp_path)
