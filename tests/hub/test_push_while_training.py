"""`hf-mae pretrain --push_to_hub` on two processes: pushing neither stops the training nor keeps it waiting."""

import signal
import time

import psutil
import pytest
from hub_server import HubServer
from processes import TORCHRUN, derived, last_step, ranks_of
from runs import arguments, checkpoints, losses, spawn, wait_for_step, weights_hash
from test_push import FILES

pytestmark = pytest.mark.slow
OPTIONS = {"total_steps": 60, "save_steps": 20, "eval_steps": 60, "keep_checkpoints": 10, "push_to_hub": "user/run"}


@pytest.fixture
def server(tmp_path):
    with HubServer(tmp_path / "hub") as running:
        yield running


def start(output_dir, server, **keys):
    """A run on two processes, both of which know the server; what they say goes into `log`."""
    variables = {name: value for name, value in server.env.items() if name.startswith(("HF_", "NO_PROXY", "no_proxy"))}
    words = arguments(output_dir, **{**OPTIONS, **keys})
    command = [*TORCHRUN, "-m", "hf_mae.cli", *words]
    return spawn(command, output_dir.parent / "log", ACCELERATE_USE_CPU="true", **variables)


def asked(server, what: str) -> int:
    return sum(f"{request.method} {request.path}" == what for request in server.requests)


def wait_until(condition, process=None, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.02)


def pushes(output_dir) -> list[psutil.Process]:
    """Processes that push something of this run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "push" in words and any(str(output_dir) in word for word in words):
            found.append(process)
    return found


@pytest.fixture
def output_dir(tmp_path):
    """A run's folder; at the end nothing pushes from there any more."""
    yield tmp_path / "run"
    for process in pushes(tmp_path / "run"):
        process.kill()


def test_checkpoints_are_pushed_while_the_run_goes_on_and_the_model_at_the_end(output_dir, server):
    process = start(output_dir, server)
    wait_until(lambda: asked(server, "POST /api/repos/create"), process)
    assert last_step(output_dir) > 20, "the steps after a checkpoint didn't wait for its push"
    assert process.wait(timeout=240) == 0
    log = (output_dir.parent / "log").read_text()
    assert "Traceback" not in log
    assert derived(output_dir)["processes"] == 2
    assert sorted(losses(output_dir)) == list(range(1, 61))
    skipped, published = log.count("is not pushed: the previous push to"), log.count("published ")
    # Two checkpoints before the last step, and the model. A second process that pushed would push them all again.
    assert skipped + published == 3
    assert published >= 2
    assert asked(server, "POST /api/repos/create") == published
    repository = server.root / "models" / "user" / "run"
    assert {path.name for path in repository.iterdir()} == FILES
    assert weights_hash(repository) == weights_hash(output_dir)
    assert "before the end of the run" not in (repository / "README.md").read_text()
    assert pushes(output_dir) == []


def test_a_run_stopped_while_it_pushes_saves_and_ends_and_the_push_arrives(output_dir, server):
    process = start(output_dir, server, total_steps=100_000, eval_steps=100_000, warmup_steps=20, keep_checkpoints=500)
    wait_until(lambda: asked(server, "POST /api/repos/create"), process)
    ranks_of(process)[0].send_signal(signal.SIGTERM)  # to a rank: torchrun itself, when told, ends with a traceback
    assert process.wait(timeout=60) == 0
    log = (output_dir.parent / "log").read_text()
    assert "Traceback" not in log
    last = max(losses(output_dir))
    assert f"stopped on request after step {last}; continue with --resume auto" in log
    assert checkpoints(output_dir)[-1] == last
    wait_until(lambda: not pushes(output_dir))
    repository = server.root / "models" / "user" / "run"
    assert {path.name for path in repository.iterdir()} == FILES - {"reconstruction.png"}  # drawn at the end
    assert weights_hash(repository) == weights_hash(output_dir / "checkpoint-20")


@pytest.mark.parametrize("how", ["it is gone", "it dies at the upload"])
def test_a_server_that_dies_costs_a_line_and_nothing_of_the_training(output_dir, tmp_path, how):
    with HubServer(tmp_path / "hub") as server:
        process = start(output_dir, server)
        if how == "it dies at the upload":
            server.break_at = (r"POST .*/commit/main", 1000)
            assert process.wait(timeout=240) == 0
        else:
            wait_for_step(output_dir, 1, process)
    assert process.wait(timeout=240) == 0
    log = (output_dir.parent / "log").read_text()
    assert "Traceback" not in log
    told = [line for line in log.splitlines() if "the Hub can't be reached" in line]
    assert len(told) in (2, 3)  # of a checkpoint or both, and of the model
    assert all(line.startswith("hf-mae: error: user/run: ") and line.endswith("; push again") for line in told)
    assert sorted(losses(output_dir)) == list(range(1, 61))
    assert checkpoints(output_dir) == [20, 40, 60]
    assert "load it" in log
