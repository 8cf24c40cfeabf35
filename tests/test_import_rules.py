"""The import rules of pyproject.toml: kept by the package, and able to fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY, environment

pytest.importorskip("importlinter")


@pytest.fixture
def copy(tmp_path):
    """A copy of the package and of its rules."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "hf_mae", tmp_path / "hf_mae", ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    env = environment(PYTHONPATH=str(folder))
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_the_package_keeps_the_import_rules(copy):
    result = lint_imports(copy)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("data/order.py", "from ..training.pretrain import pretrain", "data is not allowed to import hf_mae.training"),
        ("errors.py", "def use():\n    from .files import write_text", "errors is not allowed to import hf_mae.files"),
        ("layers_mae.py", "from .errors import UserError", "layers_mae is not allowed to import hf_mae.errors"),
        ("keys/data_keys.py", "import torch", "hf_mae.keys is not allowed to import torch"),
        ("hub/push.py", "from ..cli import main", "hf_mae.cli"),
    ],
)  # fmt: skip
def test_a_wrong_import_is_found(copy, file, line, broken):
    path = copy / "hf_mae" / file
    path.write_text(f"{path.read_text()}\n\n{line}\n")
    result = lint_imports(copy)
    assert result.returncode == 1
    assert broken in " ".join(result.stdout.split())
