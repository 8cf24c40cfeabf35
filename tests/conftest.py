"""Options and fixtures of the whole test suite."""

import os
import signal

# Before anything imports huggingface_hub, which reads it once.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Processes that a test starts add in the order of this one, so that their outputs can be compared bit by bit.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# In the background of a shell, Python starts with key presses ignored; tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tiny tensors gain nothing from a second thread, and test processes beside this one lose by it.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    slow = pytest.mark.skip(reason="slow: run with --all")
    gpu = pytest.mark.skip(reason="gpu: torch sees no GPU on this machine")
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--all"):
            item.add_marker(slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(gpu)


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random numbers, whichever ran before it; a test may ask for the seed."""
    torch.manual_seed(0)
    return 0
