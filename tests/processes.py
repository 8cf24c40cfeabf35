"""Runs on several processes: by torchrun, or, quicker, forked from this process, which has everything imported."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from runs import arguments, environment, start

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def torchrun(output_dir: Path, program=("-m", "hf_mae.cli"), launcher=TORCHRUN, **keys) -> str:
    """A tiny run on two processes that has to go well; what they printed."""
    command = [sys.executable, *launcher, *map(str, program), *arguments(output_dir, **keys)]
    variables = environment(ACCELERATE_USE_CPU="true", PYTHONFAULTHANDLER="1")
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            stdout, stderr = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            for hung in [*psutil.Process(process.pid).children(recursive=True), process]:
                hung.send_signal(signal.SIGABRT)  # each says where it is
            stdout, stderr = process.communicate()
            pytest.fail(f"hung:\n{stdout[-3000:]}\n{stderr[-20000:]}")
    assert process.returncode == 0, stderr[-3000:]
    assert derived(output_dir)["processes"] == 2
    return stdout


def derived(output_dir: Path) -> dict:
    return yaml.safe_load((output_dir / "run_config.yaml").read_text())["derived"]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def fork(output_dir: Path, ranks: int, change: Callable[[], None] | None = None, **keys) -> list[int]:
    """Start a tiny run; the process ids of its ranks, each of which leads a process group.

    Args:
        output_dir: its folder; what it says goes into files beside it.
        ranks: processes.
        change: made in the first of them before it starts.
        **keys: of its recipe.
    """
    port, pids = free_port(), []
    words = arguments(output_dir, **keys)
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
    """The newest step that a run has logged; 0 if there is none yet."""
    metrics = output_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "hf_mae.cli" in " ".join(child.cmdline())]


@contextlib.contextmanager
def nothing_left(process: subprocess.Popen):
    """In the end all processes are gone, whatever the test found."""
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
