"""A drill to watch: a run that is killed, stopped and loses a checkpoint ends with the weights of an undisturbed run.

    python scripts/chaos_drill.py                  about two minutes on two cores
    python scripts/chaos_drill.py --processes 2    the same with two processes under torchrun

Exit code 0 if the weights are the same, bit for bit.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

STARTED = time.monotonic()
STEPS = 120
RECIPE = ["--recipe", "quickstart", "--total_steps", STEPS, "--save_steps", 10, "--log_steps", 2, "--eval_steps", STEPS]


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.1f} s] {text}", flush=True)


def start(output_dir: Path, processes: int) -> subprocess.Popen:
    """Start the command that a user types, in a new session, so that all its processes can be killed at once."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "hf_mae.cli", "pretrain", *RECIPE, "--output_dir", output_dir]
    with (output_dir.parent / f"{output_dir.name}.log").open("a") as log:
        return subprocess.Popen(
            [str(word) for word in [*command, "--resume", "auto"]],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def last_step(output_dir: Path) -> int:
    metrics = output_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def wait_for(output_dir: Path, step: int, process: subprocess.Popen) -> None:
    while last_step(output_dir) < step:
        if process.poll() is not None:
            sys.exit(f"the run ended by itself; see {output_dir.parent / output_dir.name}.log")
        time.sleep(0.01)


def newest(output_dir: Path) -> Path:
    return max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def kill(process: subprocess.Popen, output_dir: Path) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    say(f"SIGKILL after step {last_step(output_dir)}; the newest checkpoint is {newest(output_dir).name}")


def stop(process: subprocess.Popen, output_dir: Path) -> None:
    process.terminate()
    process.wait()
    say(f"SIGTERM: the run saved {newest(output_dir).name} and ended")


def damage(process: subprocess.Popen, output_dir: Path) -> None:
    kill(process, output_dir)
    weights = newest(output_dir) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    say(f"one bit of {newest(output_dir).name}/model.safetensors flipped: the run has to resume from an older one")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="number of training processes")
    parser.add_argument("--seed", type=int, default=None, help="seed of the moments; every drill differs when omitted")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="hf_mae_drill_"))
    say(f"two runs of {STEPS} steps on {options.processes} process(es), in {folder}")

    peaceful = start(folder / "peaceful", options.processes)
    if peaceful.wait():
        sys.exit(f"the run failed; see {folder / 'peaceful.log'}")
    say(f"undisturbed:   weights {sha256(folder / 'peaceful' / 'model.safetensors')[:16]}")

    output_dir = folder / "harassed"
    misfortunes: list[Callable[[subprocess.Popen, Path], None]] = [kill, stop, damage, kill]
    # One in each quarter of the run, so that there is always a checkpoint to resume from.
    for quarter, misfortune in enumerate(misfortunes):
        process = start(output_dir, options.processes)
        step = quarter * 25 + moments.randrange(21 if quarter == 2 else 11, 25)
        wait_for(output_dir, step, process)
        time.sleep(moments.uniform(0, 0.1))
        misfortune(process, output_dir)
    if start(output_dir, options.processes).wait():
        sys.exit(f"the last start failed; see {folder / 'harassed.log'}")
    say(f"harassed:      weights {sha256(output_dir / 'model.safetensors')[:16]}")
    for line in (folder / "harassed.log").read_text().splitlines():
        if "falling back" in line:
            say(f"the run reported: {line[line.index(str(output_dir)) :]}")

    same = sha256(output_dir / "model.safetensors") == sha256(folder / "peaceful" / "model.safetensors")
    say("the same weights, bit for bit" if same else f"THE WEIGHTS DIFFER; see {folder}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
