"""The project's own files: packaging, citation, changelog and automation agree with the code and with each other."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from pages import blocks
from runs import REPOSITORY

import hf_mae

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = {
    extra: [Requirement(words) for words in requirements]
    for extra, requirements in PROJECT["optional-dependencies"].items()
}
REQUIREMENTS = [*map(Requirement, PROJECT["dependencies"]), *(each for extra in EXTRAS.values() for each in extra)]
DEPENDENCIES = [each for each in REQUIREMENTS if each.name != PROJECT["name"]]
INIT = ast.parse((REPOSITORY / "hf_mae" / "__init__.py").read_text())


def project_yaml(name: str) -> dict:
    return yaml.safe_load((REPOSITORY / name).read_text())


def test_the_version_is_stated_once():
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "hf_mae.__version__"}
    assert "version" not in project_yaml("CITATION.cff")
    assert str(Version(hf_mae.__version__)) == hf_mae.__version__


def test_the_version_is_a_literal_so_that_building_imports_no_torch():
    stated = [
        node.value for node in INIT.body if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "__version__"
    ]
    assert [ast.literal_eval(value) for value in stated] == [hf_mae.__version__]


def test_the_public_names_are_listed_once_and_can_be_imported():
    stub = ast.parse((REPOSITORY / "hf_mae" / "__init__.pyi").read_text())
    listed = [alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(hf_mae.__all__) == sorted([*listed, "register"])
    assert len(set(listed)) == len(listed)
    for name in set(listed) - {"SIZES"}:
        assert getattr(hf_mae, name).__module__.startswith("hf_mae")


def imported_names(text: str) -> set[str]:
    """`module.name` of everything that Python code imports from this package."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if (node.module or "").split(".")[0] == "hf_mae"]
    return {f"{node.module}.{alias.name}" for node in ours for alias in node.names}


# A decoder that a benchmark turns off; how a study reads a recipe.
NOT_PUBLIC = {"hf_mae.data.decode", "hf_mae.commandline.parse", "hf_mae.commandline.shipped_recipes"}


def test_the_documentation_and_the_scripts_use_public_names_only():
    texts = [path.read_text() for path in (REPOSITORY / "scripts").rglob("*.py")]
    texts += [code for _, code in blocks("python")]
    names = set().union(*map(imported_names, texts))
    assert names - NOT_PUBLIC == {f"hf_mae.{name}" for name in hf_mae.__all__} & names
    assert len(names) > 20


def test_the_changelog_is_in_its_form_and_knows_this_version():
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", title) for title in titles[1:])
    if titles[1:]:  # after the first release
        assert titles[1].startswith(f"[{hf_mae.__version__}]")
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


def test_the_citation_names_the_software_and_the_paper():
    citation = project_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == [{"name": "The hf_mae authors"}]
    (paper,) = citation["references"]
    assert paper["title"] == "Masked Autoencoders Are Scalable Vision Learners"
    names = " ".join(author["family-names"] for author in paper["authors"])
    assert names == "He Chen Xie Li Dollár Girshick"
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2111.06377"}]


@pytest.mark.parametrize("requirement", DEPENDENCIES, ids=str)
def test_every_dependency_has_a_lower_bound_and_the_same_wherever_it_is_named(requirement):
    assert {specifier.operator for specifier in requirement.specifier} & {">=", "=="}
    others = [each.specifier for each in DEPENDENCIES if each.name == requirement.name]
    assert all(other == requirement.specifier for other in others)


def test_every_extra_that_is_named_anywhere_exists():
    files = [REPOSITORY / "pyproject.toml", *REPOSITORY.glob("*.md")]
    files += [file for folder in ("hf_mae", "scripts", "tests") for file in (REPOSITORY / folder).rglob("*.py")]
    named = {
        extra
        for file in files
        for extras in re.findall(r"hf-mae\[([a-z,]+)\]", file.read_text())
        for extra in extras.split(",")
    }
    assert named <= set(EXTRAS)


def test_every_import_of_the_package_is_a_declared_dependency():
    imported = set()
    for file in (REPOSITORY / "hf_mae").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).split(".")[0])
    distributions = packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in DEPENDENCIES}
    missing = [
        name
        for name in imported - sys.stdlib_module_names - {"hf_mae"}
        if not declared & {canonicalize_name(each) for each in distributions.get(name, [name])}
    ]
    assert missing == []


def test_the_workflow_runs_the_tests_on_the_oldest_python():
    workflow = project_yaml(".github/workflows/test.yml")
    assert workflow[True] == ["push", "pull_request"]  # YAML 1.1 reads the key `on` as true
    commands = []
    for job in workflow["jobs"].values():
        checkout, python, test = job["steps"]
        assert checkout["uses"].startswith("actions/checkout@")
        assert PROJECT["requires-python"] == ">=" + python["with"]["python-version"]
        commands.append(test["run"])
    assert commands == ["bash scripts/test.sh", "bash scripts/test.sh --lowest"]


def test_the_hooks_run_the_tools_of_the_projects_environment():
    (repository,) = project_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    tested = (REPOSITORY / "scripts" / "test.sh").read_text()
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        tool = hook["entry"].split()[0]
        assert tool.startswith(".venv/bin/")
        assert tool in tested, "scripts/test.sh checks what a hook checks"
