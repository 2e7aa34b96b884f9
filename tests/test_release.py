"""The project is ready for a release: one version, a changelog, and workflows that can run."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import ldae

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
FORMS = sorted((ROOT / ".github").rglob("*.yml"))
WORKFLOWS = {path.name: path for path in (ROOT / ".github" / "workflows").iterdir()}


def jobs(name: str) -> dict:
    return yaml.safe_load(WORKFLOWS[name].read_text())["jobs"]


def made(name: str) -> set[str]:
    """Return the targets of make that a workflow runs."""
    commands = [step.get("run", "") for job in jobs(name).values() for step in job["steps"]]
    return set(re.findall(r"^make ([\w-]+)", "\n".join(commands), re.M))


def test_the_version_is_written_once():
    source = (ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]).read_text()
    assert re.findall(r'^__version__ = "(.+?)"', source, re.M) == [ldae.__version__]
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert "version" not in citation and "version" not in PYPROJECT["project"]


def test_the_changelog_has_the_version_or_unreleased_changes():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] in ("Unreleased", ldae.__version__)
    assert len(headings) == len(set(headings))


def test_the_package_is_typed():
    assert (Path(ldae.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_make_what_the_makefile_has(name):
    assert made(name)
    for target in made(name):
        assert f"\n{target}:" in MAKEFILE, target


def test_the_workflows_make_what_ci_makes():
    """The checks of a change are the same everywhere; the workflows add the release."""
    own = set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.M))
    assert made("tests.yml") | made("docs.yml") == own | {"release-check"}


def test_the_workflow_tests_the_python_versions_of_the_metadata():
    project = PYPROJECT["project"]
    versions = re.findall(r"Python :: (3\.\d+)$", "\n".join(project["classifiers"]), re.M)
    assert jobs("tests.yml")["newest"]["strategy"]["matrix"]["python"] == versions
    assert project["requires-python"] == f">={versions[0]}"


def test_only_the_job_that_publishes_can_ask_for_a_token():
    for name in WORKFLOWS:
        assert yaml.safe_load(WORKFLOWS[name].read_text())["permissions"] == {"contents": "read"}
        for job, table in jobs(name).items():
            assert ("id-token" in table.get("permissions", ())) == (job == "publish"), job


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_forms_and_workflows_can_be_read(path):
    table = yaml.safe_load(path.read_text())
    assert table["name"]
    if "body" in table:
        assert table["description"]
        fields = [field for field in table["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in fields}) == len(fields)
        assert all(field["attributes"]["label"] for field in fields)


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_linked_files_exist(name):
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", (ROOT / name).read_text()):
        assert (ROOT / path).exists(), path


def test_contributors_are_told_targets_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.M):
        assert f"\n{target}:" in MAKEFILE, target
