"""The README's code, run as it stands there; that about fine-tuning is in test_readme_finetune.py."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import run, start

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BASH = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
# Words of the Python that other tests run, which have what it needs.
ELSEWHERE = {
    "layer_decay_groups": "test_readme_finetune.py",
    "FinetuneRecipe": "test_readme_finetune.py",
    "load_dataset": "test_readme_finetune.py",
    "peft": "test_readme_finetune.py",
    "onnxruntime": "test_export.py",
    "trust_remote_code": "test_hub_push.py",
}
HERE = [code for code in PYTHON if not any(word in code for word in ELSEWHERE)]
# Commands that take seconds with a tiny model.
QUICK = ("reconstruct", "report", "card", "evaluate knn", "embed")
COMMANDS = [
    line.split(" #")[0].strip()
    for block in BASH
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(tuple(f"hf-mae {name} " for name in QUICK))
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("trained") / "run", total_steps=2)


@pytest.fixture
def home(trained, tmp_path, monkeypatch):
    """A folder with models and images where the README has them."""
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "mine"):
        shutil.copytree(trained, tmp_path / "outputs" / name)
    (tmp_path / "path" / "to" / "images").mkdir(parents=True)
    for name in ("photo.jpg", "path/to/images/0.jpg", "path/to/images/1.jpg"):
        photo().save(name)
    for name in (f"DATA/{split}/{label}/{i}.png" for split in ("train", "test") for label in "ab" for i in range(8)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo().save(name)
    return tmp_path


def photo() -> Image.Image:
    return Image.fromarray(np.arange(64 * 48, dtype=np.uint32).astype(np.uint8).reshape(48, 64))


def test_there_is_code_of_every_kind():
    assert len(HERE) >= 4
    assert len(COMMANDS) >= 5
    for word, file in ELSEWHERE.items():
        assert any(word in code for code in PYTHON), f"{word} is no longer in the README; see {file}"


@pytest.mark.parametrize("code", HERE, ids=lambda code: code.splitlines()[-1][:40])
def test_the_python_runs(home, code):
    names: dict = {"image": photo()}
    exec(compile(code, "README.md", "exec"), names)
    if "reconstruction_grid" in code:
        with Image.open("picture.png") as picture:
            assert picture.width > 4 * 128
    elif "features" in code:
        assert names["features"].shape == (1, names["model"].config.hidden_size)
    elif "UperNet" in code:
        assert names["model"].backbone.channels == [names["backbone"].config.hidden_size] * 4
    else:
        assert names["output"].logits.shape == (4, 48, 256)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_run(home, line, capsys):
    assert start(*shlex.split(line)[1:]) == 0, capsys.readouterr().err
