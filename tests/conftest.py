"""Options and fixtures of the whole test suite."""

import os
import shutil
import signal
from pathlib import Path

# Before anything imports huggingface_hub, which reads it once.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Processes that a test starts add in the order of this one, so that their outputs can be compared bit for bit.
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


@pytest.fixture
def scripts(monkeypatch):
    """The folder of the scripts, whose modules can be imported."""
    folder = Path(__file__).parents[1] / "scripts"
    for part in ("benchmarks", "checks", "examples", "studies"):
        monkeypatch.syspath_prepend(str(folder / part))
    return folder


@pytest.fixture
def recipe_file(tmp_path):
    """Writes a recipe; its path."""

    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("browser: no chromium is installed; 'apt-get install chromium' brings it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def pages(browser):
    """Opens an address. What it asks of others is refused, and nothing but that may be an error in its console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(60_000)
    errors: list[str] = []

    def opened(address: str):
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        context.route(lambda asked: not asked.startswith((address, "data:", "blob:")), lambda route: route.abort())
        page.goto(address)
        return page

    yield opened
    context.close()
    assert [text for text in errors if "net::ERR_FAILED" not in text] == []
