"""Runs on several processes: torchrun and accelerate launch over gloo, on CPUs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from processes import TORCHRUN, derived, ends, fork, free_port, last_step, nothing_left, ranks_of, torchrun
from runs import (
    REPOSITORY,
    arguments,
    checkpoints,
    cut_off,
    environment,
    evaluations,
    events,
    losses,
    run,
    spawn,
    start,
    wait_for_step,
    weights_difference,
    weights_hash,
)
from transformers import AutoModel

from hf_mae import MAEModel

# Evaluations at odd steps, of 92 images on 2 x 16 places: the last batches are smaller, and the ranks' differ.
OPTIONS = {"total_steps": 8, "save_steps": 4, "eval_steps": 3, "max_eval_samples": 53, "keep_checkpoints": 9}
FSDP_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: "no"
num_machines: 1
num_processes: 2
use_cpu: true
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: MAELayer
"""
# Accelerate shards weights on accelerators alone: here its state is told that it does.
FSDP_ON_CPU = """
import sys
from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from hf_mae import cli
from hf_mae.training import devices

class Sharding(Accelerator):
    def __init__(self, **options):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["MAELayer"]
        )
        super().__init__(fsdp_plugin=plugin, **options)
        PartialState._shared_state["distributed_type"] = self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = plugin

devices.Accelerator = Sharding
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single") / "run", **OPTIONS)


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    """The run on two processes, each of which accumulates two micro-batches; and what they printed."""
    output_dir = tmp_path_factory.mktemp("double") / "run"
    return output_dir, torchrun(output_dir, per_device_batch_size=8, num_workers=1, **OPTIONS)


# ------------------------------------------------------------------------------------------ DDP


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(single, double):
    output_dir, _ = double
    assert derived(output_dir)["strategy"] == "DDP"
    assert (derived(output_dir)["per_device_batch_size"], derived(output_dir)["grad_accum_steps"]) == (8, 2)
    assert losses(output_dir) == pytest.approx(losses(single), rel=1e-5)
    assert evaluations(output_dir) == pytest.approx(evaluations(single), rel=1e-5)
    assert evaluations(output_dir)[0] == pytest.approx(evaluations(single)[0], rel=1e-6)
    norms, expected = ([e["grad_norm"] for e in events(folder) if "loss" in e] for folder in (output_dir, single))
    assert norms == pytest.approx(expected, rel=1e-4)
    assert weights_difference(output_dir, single) < 1e-5
    assert type(AutoModel.from_pretrained(output_dir)) is MAEModel
    first = "reconstructions/step-0.png"
    assert (output_dir / first).read_bytes() == (single / first).read_bytes()


@pytest.mark.slow
def test_one_of_two_processes_talks(double):
    output_dir, printed = double
    assert printed.count("data     digits") == printed.count("images   1 channel") == 1
    assert printed.count("2 processes x 2 x 8 (DDP, cpu") == 1
    assert printed.count(f"model    {output_dir}") == 1


@pytest.mark.slow
def test_one_of_two_processes_warns(tmp_path):
    for number in range(8):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("L", (3, 3), number).save(tmp_path / "data" / f"{number}.png")
    words = arguments(
        tmp_path / "run", dataset=tmp_path / "data", total_batch_size=16, quality_steps=1, total_steps=1, dry_run=True
    )
    command = [sys.executable, *TORCHRUN, "-m", "hf_mae.cli", *words]
    variables = environment(ACCELERATE_USE_CPU="true")
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=180, check=True)
    assert done.stdout.count("data     ") == done.stdout.count("images   ") == 1
    for line in ("larger than the training set of 7", "none of 7 images has a label", "images are enlarged 2.7 times"):
        assert done.stderr.count(line) == 1


@pytest.mark.slow
def test_two_processes_go_on_exactly(double, tmp_path):
    output_dir = cut_off(double[0], 4, tmp_path / "run")
    torchrun(output_dir, resume="auto", per_device_batch_size=8, **OPTIONS)
    assert weights_hash(output_dir) == weights_hash(double[0])
    assert losses(output_dir) == losses(double[0])
    assert evaluations(output_dir) == evaluations(double[0])


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(double, tmp_path):
    output_dir = cut_off(double[0], 4, tmp_path / "run")
    run(output_dir, resume="auto", num_workers=2, **OPTIONS)
    assert derived(output_dir)["processes"] == 1
    assert losses(output_dir) == pytest.approx(losses(double[0]), rel=1e-5)
    assert weights_difference(output_dir, double[0]) < 1e-5


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(single, tmp_path):
    output_dir = cut_off(single, 4, tmp_path / "run")
    torchrun(output_dir, resume="auto", **OPTIONS)
    assert losses(output_dir) == pytest.approx(losses(single), rel=1e-5)
    assert weights_difference(output_dir, single) < 1e-5


LONG = {"total_steps": 150, "eval_steps": 150, "save_steps": 150, "warmup_steps": 20, "num_workers": 1}


def start_torchrun(output_dir: Path, *flags: str, **keys):
    """A run on two processes that goes on while the test does something to it."""
    command = [*TORCHRUN, *flags, "-m", "hf_mae.cli", *arguments(output_dir, **keys)]
    return spawn(command, output_dir.parent / "log", ACCELERATE_USE_CPU="true")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_torchrun_saves_the_step_that_is_under_way_on_all_ranks(tmp_path, name):
    output_dir = tmp_path / "run"
    flags = [] if name == "SIGTERM" else ["--signals-to-handle", "SIGTERM,SIGUSR1"]
    process = start_torchrun(output_dir, *flags, **LONG)
    with nothing_left(process):
        wait_for_step(output_dir, 20, process)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 4  # two ranks with a worker each
        process.send_signal(getattr(signal, name))
        process.wait(timeout=30)
        assert not any(child.is_running() for child in children)
    last = max(losses(output_dir))
    assert 20 <= last < 150
    assert checkpoints(output_dir) == [last]
    said = (tmp_path / "log").read_text()
    assert f"stopped on request after step {last}" in said
    assert "exitcode" not in said  # what torchrun would say of a rank that failed
    run(output_dir, resume="auto", **LONG)
    whole = losses(run(tmp_path / "whole", **LONG))
    assert list(losses(output_dir)) == list(whole)
    # Rounding alone tells the two apart, and after so few steps it has not grown.
    some = range(last - 5, last + 6)
    assert [losses(output_dir)[step] for step in some] == pytest.approx([whole[step] for step in some], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("told", [[0], [1], [0, 1]])
def test_a_signal_to_some_of_the_processes_lets_all_of_them_save_and_end_well(tmp_path, number, told):
    output_dir = tmp_path / "run"
    pids = fork(output_dir, 2, **LONG)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and last_step(output_dir) < 10:
        time.sleep(0.02)
    for rank in told:
        os.kill(pids[rank], number)
    assert ends(pids, seconds=30) == [0, 0]
    last = max(losses(output_dir))
    assert 10 <= last < 150
    assert checkpoints(output_dir) == [last]


@pytest.mark.slow
def test_a_run_with_a_killed_rank_is_restarted_by_torchrun_and_ends_the_same(tmp_path):
    options = {**OPTIONS, "total_steps": 120, "save_steps": 10, "eval_steps": 120, "keep_checkpoints": 2}
    whole, output_dir = tmp_path / "whole", tmp_path / "run"
    torchrun(whole, **options)
    process = start_torchrun(output_dir, "--max-restarts", "2", resume="auto", **options)
    with nothing_left(process):
        for step, rank in ((23, 1), (71, 0)):
            wait_for_step(output_dir, step, process)
            ranks = ranks_of(process)
            assert len(ranks) == 2
            ranks[rank].kill()
        assert process.wait(timeout=150) == 0
    assert weights_hash(output_dir) == weights_hash(whole)
    assert losses(output_dir) == losses(whole)


# ------------------------------------------------------------------------------------------ FSDP2


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "sharding.py").write_text(FSDP_ON_CPU)
    torchrun(folder / "run", [folder / "sharding.py"], **OPTIONS)
    return folder


@pytest.mark.slow
def test_sharded_weights_take_the_steps_of_whole_ones_and_are_saved_whole(sharded, single):
    output_dir = sharded / "run"
    assert derived(output_dir)["strategy"] == "FSDP"
    assert losses(output_dir) == pytest.approx(losses(single), rel=1e-5)
    assert evaluations(output_dir) == pytest.approx(evaluations(single), rel=1e-5)
    for folder in (".", "checkpoint-4", "checkpoint-8"):
        assert weights_difference(output_dir / folder, single / folder) < 1e-5
        assert type(AutoModel.from_pretrained(output_dir / folder)) is MAEModel


@pytest.mark.slow
def test_a_sharded_run_goes_on_exactly_and_unsharded_too(sharded, tmp_path):
    output_dir = cut_off(sharded / "run", 4, tmp_path / "run")
    torchrun(output_dir, [sharded / "sharding.py"], resume="auto", **OPTIONS)
    assert weights_hash(output_dir) == weights_hash(sharded / "run")
    assert losses(output_dir) == losses(sharded / "run")
    output_dir = cut_off(sharded / "run", 4, tmp_path / "other")
    run(output_dir, resume="auto", **OPTIONS)
    assert losses(output_dir) == pytest.approx(losses(sharded / "run"), rel=1e-5)
    assert weights_difference(output_dir, sharded / "run") < 1e-5


# ------------------------------------------------------------------------------------------ what was not obtained


@pytest.mark.slow
def test_fsdp_asked_of_accelerate_on_cpus_is_refused_in_one_line_of_each_process(tmp_path):
    (tmp_path / "fsdp.yaml").write_text(FSDP_CONFIG)
    launch = ["-m", "accelerate.commands.launch", "--config_file", tmp_path / "fsdp.yaml", "-m", "hf_mae.cli"]
    command = [sys.executable, *map(str, launch), *arguments(tmp_path / "run")]
    # Accelerate's own flag for CPUs (use_cpu) starts both processes, and lets each of them work alone.
    variables = environment(ACCELERATE_USE_CPU="true")
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if "hf-mae: error:" in line]
    wanted = (
        "hf-mae: error: Accelerate chose MULTI_CPU instead of FSDP, which needs a GPU for each process; "
        "start as many processes as there are GPUs, or leave FSDP out"
    )
    assert said == [wanted, wanted]
    assert "hf_mae/training" not in result.stderr  # no traceback of ours
    assert not (tmp_path / "run").exists()


def test_a_strategy_or_processes_that_were_not_obtained_are_an_error(tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as asked:
        asked.setenv("ACCELERATE_USE_FSDP", "true")
        assert start(*arguments(tmp_path / "run")) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("hf-mae: error: Accelerate chose NO instead of FSDP")
    # As in a process that torchrun started on a machine without GPUs.
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert start(*arguments(tmp_path / "run")) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("hf-mae: error: 2 processes were started, but only 1 would train together; use torchrun")
    assert "ACCELERATE_USE_CPU=true" in line
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ Slurm

SLURM = {
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$*" > requeued; fi',
    "srun": 'exec "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.mark.slow
def test_the_slurm_script_saves_and_requeues_before_the_time_limit_and_resumes(tmp_path):
    for name, text in SLURM.items():  # what a cluster has
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = environment(
        ACCELERATE_USE_CPU="true", PATH=f"{tmp_path}:{os.environ['PATH']}", PORT=free_port(), SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="localhost", SLURM_NNODES="1", SLURM_GPUS_ON_NODE="2",
    )  # fmt: skip
    script = REPOSITORY / "scripts" / "slurm.sh"
    words = arguments(tmp_path / "run", **LONG)[1:]  # without the command's name

    def job() -> subprocess.Popen:
        return subprocess.Popen(["bash", script, *words], cwd=tmp_path, env=variables, start_new_session=True)

    output_dir = tmp_path / "run"
    process = job()
    with nothing_left(process):
        wait_for_step(output_dir, 20, process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 0
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    (tmp_path / "requeued").unlink()
    last = max(losses(output_dir))
    assert 20 <= last < 150
    assert checkpoints(output_dir) == [last]
    process = job()
    with nothing_left(process):
        assert process.wait(120) == 0
    assert not (tmp_path / "requeued").exists()
    assert list(losses(output_dir)) == list(range(1, 151))
    assert type(AutoModel.from_pretrained(output_dir)) is MAEModel
