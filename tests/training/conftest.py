"""Runs that several files of tests look at, and what every run must leave behind."""

import contextlib
import io
import multiprocessing

import pytest
from runs import run


@pytest.fixture
def own_caches(tmp_path, monkeypatch):
    """What `datasets` prepares stays with the test, and its bars out of the messages."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def no_process_is_left():
    yield
    left = multiprocessing.active_children()
    for process in left:
        process.kill()  # they ignore the SIGTERM by which this process would end them, and then wait for ever
    assert left == []


@pytest.fixture(scope="session")
def finished_and_printed(tmp_path_factory):
    """A run of 12 steps that was left alone, and what it printed."""
    output_dir = tmp_path_factory.mktemp("runs") / "it's a run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(output_dir, save_steps=3, eval_steps=5)
    return output_dir, printed.getvalue()


@pytest.fixture(scope="session")
def finished(finished_and_printed):
    return finished_and_printed[0]


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """The same run, with all of its checkpoints."""
    return run(tmp_path_factory.mktemp("stages") / "run", save_steps=3, eval_steps=5, keep_checkpoints=9)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> str:
    """A tiny model of the digits. Without biases of attention keys, whose gradient is rounding alone."""
    return str(run(tmp_path_factory.mktemp("pretrained") / "model", total_steps=2, qkv_bias=False))
