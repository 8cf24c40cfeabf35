"""What is in a built wheel works without the repository: help, Auto classes, card and report."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from runs import REPOSITORY, environment, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the unpacked wheel, which comes before the repository on the path of its processes."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", REPOSITORY]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("hf_mae-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("finished") / "run", total_steps=2)


def python(installed: Path, home: Path, *words: object) -> str:
    env = environment(PYTHONPATH=str(installed))
    command = [sys.executable, "-P", *map(str, words)]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_has_recipes_templates_and_types_and_nothing_of_the_tests(installed):
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    for wanted in ("hf_mae/recipes/quickstart.yaml", "hf_mae/hub/card.md", "hf_mae/report.html", "hf_mae/py.typed"):
        assert wanted in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"hf_mae"}


def test_help_auto_model_card_and_report_come_from_the_wheel(installed, finished, tmp_path):
    where = python(installed, tmp_path, "-c", "import hf_mae; print(hf_mae.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    assert "--mask_ratio" in python(installed, tmp_path, "-m", "hf_mae.cli", "pretrain", "--help")
    code = "import sys, hf_mae, transformers; print(type(transformers.AutoModel.from_pretrained(sys.argv[1])).__name__)"
    assert python(installed, tmp_path, "-c", code, finished) == "MAEModel\n"
    python(installed, tmp_path, "-m", "hf_mae.cli", "card", finished, "card.md")
    assert "# card" in (tmp_path / "card.md").read_text()
    python(installed, tmp_path, "-m", "hf_mae.cli", "report", finished, "--output", "report.html")
    assert "</html>" in (tmp_path / "report.html").read_text()
