"""The import rules of pyproject.toml: kept by the package, and able to fail."""

import ast
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


def unseen_imports(source: str) -> list[str]:
    """Imports of this package's files in another form than `from .name import x`, the one that transformers follows."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            flat = node.level == 1 and node.module is not None and "." not in node.module
            names = [] if flat else [node.module or "."] if node.level == 0 else ["hf_mae"]
        found += [ast.unparse(node) for name in names if name.split(".")[0] == "hf_mae"]
    return found


def test_hub_files_import_each_other_in_the_form_that_transformers_follows():
    files = sorted((REPOSITORY / "hf_mae").glob("*_mae.py"))
    assert len(files) > 10
    assert {file.name: bad for file in files if (bad := unseen_imports(file.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    ["from . import configuration_mae", "from .data.stats import x", "from ..a import b", "import hf_mae.errors",
     "from hf_mae.errors import UserError", "def f():\n    from . import layers_mae as layers"],
)  # fmt: skip
def test_an_import_that_transformers_does_not_follow_is_found(line):
    assert len(unseen_imports(f"import torch\nfrom .layers_mae import MAELayer\n{line}")) == 1
