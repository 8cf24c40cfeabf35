"""Fixtures of the tests of data."""

import fsspec
import pytest


@pytest.fixture
def own_caches(tmp_path, monkeypatch):
    """Caches of this test alone, and no pauses between tries."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "hf" / "downloads")
    monkeypatch.setattr("hf_mae.data.remote.RETRY_FIRST_DELAY", 0.001)
    datasets.disable_progress_bars()
    yield
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
