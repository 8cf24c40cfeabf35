"""How a run of `hf-mae pretrain` ends that is told to, killed, or fails."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys

import psutil
import pytest
from processes import nothing_left
from runs import arguments, checkpoints, environment, losses, mistake, run, spawn, start, wait_for_step, weights_hash

import hf_mae.data.loader
from hf_mae import files
from hf_mae.errors import DataError, MissingPackage
from hf_mae.training.log import RunLog

pytestmark = pytest.mark.usefixtures("own_caches", "no_process_is_left")


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_that_is_under_way_and_the_run_goes_on_from_it(
    stages, tmp_path, monkeypatch, capfd, signal_number
):
    log_event = RunLog.event

    def event_and_signal(log, step, **numbers):
        log_event(log, step, **numbers)
        if step == 4:
            os.kill(os.getpid(), signal_number)

    before = signal.getsignal(signal_number)
    output_dir = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "event", event_and_signal)
        run(output_dir, save_steps=12, eval_steps=5, num_workers=2)
    assert signal.getsignal(signal_number) is before
    assert multiprocessing.active_children() == []
    assert checkpoints(output_dir) == [4]
    assert not (output_dir / "model.safetensors").exists()
    assert "stopped on request after step 4" in "".join(capfd.readouterr())
    run(output_dir, save_steps=12, eval_steps=5, resume="auto")
    assert weights_hash(output_dir) == weights_hash(stages)
    assert losses(output_dir) == losses(stages)


LONG = {"total_steps": 400, "eval_steps": 400, "save_steps": 20, "warmup_steps": 20}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("long") / "run", **LONG)


@pytest.mark.slow
def test_sigterm_with_loader_workers_alive_saves_ends_well_and_leaves_no_process(uninterrupted, tmp_path):
    output_dir = tmp_path / "run"
    process = spawn(["-m", "hf_mae.cli", *arguments(output_dir, num_workers=2, **LONG)], tmp_path / "log")
    with nothing_left(process):
        wait_for_step(output_dir, 30, process)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.terminate()
        assert process.wait(timeout=20) == 0, (tmp_path / "log").read_text()
        assert not any(child.is_running() for child in children)
    last = max(losses(output_dir))
    assert 30 <= last < 400
    assert checkpoints(output_dir)[-1] == last
    assert f"stopped on request after step {last}" in (tmp_path / "log").read_text()
    run(output_dir, resume="auto", **LONG)
    assert weights_hash(output_dir) == weights_hash(uninterrupted)
    assert losses(output_dir) == losses(uninterrupted)


@pytest.mark.slow
def test_two_runs_of_sigkill_change_nothing_about_the_weights(uninterrupted, tmp_path):
    output_dir = tmp_path / "run"
    for resume, step in (("none", 47), ("auto", 131)):
        command = arguments(output_dir, num_workers=2, resume=resume, **LONG)
        process = spawn(["-m", "hf_mae.cli", *command], tmp_path / f"log-{step}")
        try:
            wait_for_step(output_dir, step, process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not (output_dir / "model.safetensors").exists()
    run(output_dir, resume="auto", **LONG)
    assert weights_hash(output_dir) == weights_hash(uninterrupted)
    assert losses(output_dir) == losses(uninterrupted)
    assert not list(output_dir.glob(".tmp-*"))


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [DataError("no such thing; do another"), MissingPackage("x: pip install x")])
def test_an_error_while_loading_is_one_line_and_ends_the_workers(tmp_path, monkeypatch, capfd, workers, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(hf_mae.data.loader, "training_view", broken)
    assert start(*arguments(tmp_path / "run", num_workers=workers)) == 2
    message = capfd.readouterr().err.splitlines()
    assert message[-1] == f"hf-mae: error: {error}"
    assert not any("Traceback" in line for line in message)
    assert multiprocessing.active_children() == []


def test_a_final_model_that_cannot_be_written_is_one_line_and_written_by_a_resume(stages, tmp_path, monkeypatch, capfd):
    def no_room(folder, write):
        raise OSError(errno.ENOSPC, "No space left on device")

    options = {"save_steps": 3, "eval_steps": 5}
    with monkeypatch.context() as full:
        full.setattr(files, "replace_files", no_room)
        message = mistake(capfd, *arguments(tmp_path / "run", **options))
    assert f"the final model can't be written into {tmp_path / 'run'} (" in message
    output_dir = run(tmp_path / "run", resume="auto", **options)
    assert weights_hash(output_dir) == weights_hash(stages)
    assert losses(output_dir) == losses(stages)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["training_view", "evaluation_view"])
def test_a_process_whose_loader_workers_fail_ends(tmp_path, where):
    """Also with an error that nobody expects, whose traceback holds on to everything."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, hf_mae.cli, hf_mae.data.loader as loader\n"
        f"good, calls = loader.{where}, []\n"
        "def sometimes(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 40:\n"
        "        raise ZeroDivisionError('a bug')\n"
        "    return good(*args, **kwargs)\n"
        f"loader.{where} = sometimes\n"
        "sys.exit(hf_mae.cli.main(sys.argv[1:]))\n"
    )
    command = arguments(tmp_path / "run", num_workers=2, per_device_batch_size=16)
    result = subprocess.run(
        [sys.executable, script, *command], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert "ZeroDivisionError: a bug" in result.stderr


@pytest.mark.parametrize("when", [0, 2])
def test_a_key_press_ends_the_run_and_its_workers(tmp_path, monkeypatch, capfd, when):
    def press(log, step, **_):
        if step == when:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunLog, "event", press)
    assert start(*arguments(tmp_path / "run", num_workers=1)) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "hf-mae: error: interrupted; continue with --resume auto"
    assert multiprocessing.active_children() == []
