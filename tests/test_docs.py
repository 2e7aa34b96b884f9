"""The commands, code and links of the README and of the pages in docs/ are right."""

import ast
import functools
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest

import ldae
from benchmarks import machines
from ldae import cli, launch
from ldae.cli.commands import COMMANDS
from ldae.cli.protocols import graders
from ldae.cluster import settings
from ldae.commands.submit import read_pipeline
from ldae.evals.evaluation import Setup
from ldae.evals.suite import read_suite

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
EXTENDING = "extending.md"
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
TEXTS = {name: path.read_text() for name, path in PAGES.items()}
NOTEBOOKS = sorted(DOCS.glob("*.ipynb"))
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.M | re.S)
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


class Block(NamedTuple):
    """A block of code of a page."""

    page: str
    language: str
    code: str


BLOCKS = [Block(page, *found) for page, text in TEXTS.items() for found in FENCE.findall(text)]


def commands(*programs: str) -> list[tuple[str, str]]:
    """Return the page and the words of the shell commands that call one of the programs."""
    found = []
    for page, language, code in BLOCKS:
        if language == "sh":
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] in programs:
                    found.append((page, shlex.join(words)))
    return list(dict.fromkeys(found))


def blocks(language: str, *pages: str) -> list[Block]:
    """Return the blocks of a language, by default of all pages but the one about extending."""
    pages = pages or tuple(TEXTS.keys() - {EXTENDING})
    return [block for block in BLOCKS if block.language == language and block.page in pages]


def paths_of(files: list[Block]) -> list[str]:
    return [f"{block.page}: {block.code[:40]}" for block in files]


LDAE = commands("ldae", "torchrun")


def test_the_readme_has_commands():
    made = [command for page, command in commands("make") if page == "README.md"]
    assert made == ["make demo", "make test"]
    assert len([command for page, command in LDAE if page == "README.md"]) >= 4


def test_the_readme_is_short():
    assert len(README.split()) <= 900


def test_pages_say_whether_there_are_gpu_numbers():
    measured = [machines.read(file) for file in machines.MACHINES.glob("*.json")]
    none = not any(found["machine"]["gpu"] for found in measured)
    for page in ("README.md", "results.md"):
        assert ("no GPU numbers yet" in " ".join(TEXTS[page].split())) == none, page


@pytest.mark.parametrize("page", TEXTS)
def test_every_block_is_tested(page):
    """Each block of code has a language that a test below reads; text is no code."""
    text = TEXTS[page]
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(FENCE.findall(text))
    assert {language for language, _ in FENCE.findall(text)} <= {"sh", "python", "toml", "text"}


def test_every_command_is_tested():
    tested = ("ldae", "torchrun", "make", "pip", "python", "pytest")
    for page, language, code in BLOCKS:
        if language == "sh":
            lines = code.replace("\\\n", " ").splitlines()
            words = [shlex.split(line, comments=True) for line in lines]
            assert {found[0] for found in words if found} <= {*tested}, (page, code)


def call(command: str, monkeypatch) -> tuple[int, list[str]]:
    """Parse a command of ldae; return its exit status, and the functions that would have run."""
    called = []
    for name in (command.replace("-", "_") for command in COMMANDS):
        module = f"ldae.commands.{name}"
        original = getattr(import_module(module), name)

        @functools.wraps(original)
        def nothing(*args, original=original, **kwargs):
            inspect.signature(original).bind(*args, **kwargs)
            called.append(original.__name__)

        monkeypatch.setattr(f"{module}.{name}", nothing)
    monkeypatch.setattr("ldae.downstream.recipes.default_size", lambda backbone: "B")  # opens it
    words = shlex.split(command)
    words, flags = settings.split_flags(words)
    settings.parse_flags(flags)
    words, _ = launch.split_devices(words)  # else the command would run in ranks
    try:
        return cli.main(words[words.index("ldae") + 1 :]), called
    except SystemExit as stopped:  # the parser of arguments has printed what is wrong
        return int(stopped.code or 0), called


@pytest.mark.parametrize("page, command", [part for part in LDAE if part[0] != EXTENDING])
def test_the_command_line_accepts_it(page, command, monkeypatch):
    """The function of the command is called with these arguments; here it does nothing."""
    words = shlex.split(command)
    name = words[words.index("ldae") + 1]
    assert call(command, monkeypatch) == (0, [name.replace("-", "_")])


def added_names() -> set[str]:
    """Return the names that the code about extending adds: functions, entries and fields."""
    code = "\n".join(block.code for block in blocks("python", EXTENDING))
    found = re.findall(r'^def (\w+)|^    "(\w+)": |^    (\w+): Annotated', code, re.M)
    return {name for names in found for name in names if name}


@pytest.mark.parametrize(
    "page, command", [part for part in LDAE if part[0] == EXTENDING and "--help" not in part[1]]
)
def test_only_what_the_page_adds_is_unknown(page, command, monkeypatch, capsys):
    """A command about extending is accepted, or refused for a name that its page adds."""
    status, _ = call(command, monkeypatch)
    printed = capsys.readouterr()
    if status:
        refused = set(re.findall(r"\w+", printed.out + printed.err))
        assert refused & added_names(), printed.err


@pytest.mark.parametrize("page, command", commands("make"))
def test_the_makefile_has_the_target(page, command):
    assert f"\n{command.split()[1]}:" in MAKEFILE


@pytest.mark.parametrize("page, command", commands("pip"))
def test_installed_extras_exist(page, command):
    for extras in re.findall(r"\[(.+?)\]", command):
        assert {*extras.split(",")} <= PYPROJECT["project"]["optional-dependencies"].keys()


@pytest.mark.parametrize("page, command", commands("python", "pytest"))
def test_run_files_exist(page, command):
    program, *words = shlex.split(command)
    if program == "pytest":
        paths = [word for word in words if word.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths)
    elif words[0] == "-m":
        assert find_spec(words[1])
    else:
        assert (ROOT / words[0]).is_file()


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def imported(tree: ast.Module) -> dict[str, object]:
    """Return the names that code imports; each module must have the names."""
    found: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = import_module(alias.name)
                root = import_module(alias.name.partition(".")[0])
                found[alias.asname or root.__name__] = module if alias.asname else root
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                try:
                    value = getattr(import_module(node.module), alias.name)
                except AttributeError:
                    value = import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = value
    return found


def check_calls(code: str) -> None:
    """Check that code parses, that its imports exist, and that they take its arguments."""
    tree = ast.parse(code)
    names = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not any(isinstance(a, ast.Starred) for a in node.args):
            root, *path = ast.unparse(node.func).split(".")
            if root not in names or not all(part.isidentifier() for part in path):
                continue  # a method of a value
            function = functools.reduce(getattr, path, names[root])
            try:
                signature = inspect.signature(function)
            except ValueError:  # of C
                continue
            keywords = {part.arg: None for part in node.keywords if part.arg}
            signature.bind_partial(*[None] * len(node.args), **keywords)


@pytest.mark.parametrize("block", blocks("python"), ids=paths_of(blocks("python")))
def test_python_calls_what_exists(block):
    """`make release-check` executes these examples with the installed wheel."""
    check_calls(block.code)


@pytest.mark.parametrize("block", blocks("toml"), ids=paths_of(blocks("toml")))
def test_suites_and_pipelines_can_be_read(block, tmp_path, monkeypatch):
    monkeypatch.setattr("ldae.cluster.settings.shutil.which", str)  # there is a SLURM
    file = tmp_path / "file.toml"
    file.write_text(block.code)
    if "pretrain" in tomllib.loads(block.code):
        first, others = read_pipeline(file)
        assert first.command and others
    else:
        assert read_suite(file, (), Setup(out=tmp_path), graders())


def parts(code: str) -> list[tuple[str, str, str]]:
    """Return the parts of a block about extending: a file, the name in it, and the code there."""
    _, *found = re.split(
        r"^# ((?:ldae|tests)/\S+\.pyi?)(?:, in (\w+))?(?:, .*)?$", code, flags=re.M
    )
    return list(zip(found[::3], (name or "" for name in found[1::3]), found[2::3]))


def parse_part(code: str) -> ast.Module:
    """Parse code that may be a part of a class, a dict or a list."""
    for text in (code, dedent(code), f"{{{code}}}"):
        try:
            return ast.parse(text)
        except SyntaxError as error:
            failure = error
    raise failure


@pytest.mark.parametrize("block", blocks("python", EXTENDING), ids=lambda block: block.code[:40])
def test_code_about_extending_fits_the_package(block):
    """Each part parses, and names a file and a place that exist, unless it is a whole new file."""
    found = parts(block.code)
    assert found and block.code.startswith("# ")
    for path, place, code in found:
        is_new = code.lstrip().startswith('"""')
        assert (ROOT / path).is_file() != is_new, path
        assert not place or place in (ROOT / path).read_text(), (path, place)
        for node in ast.walk(parse_part(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "ldae":
                file = ROOT / node.module.replace(".", "/")
                if file.with_suffix(".py").exists() or (file / "__init__.py").exists():
                    imported(ast.Module([node], []))


def executed(notebook: Path) -> str:
    """Return the code of a notebook as one script."""
    cells = json.loads(notebook.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_the_notebook_runs(notebook, tmp_path):
    """On a few images. The site shows outputs that `make docs` computes; none are committed."""
    for cell in json.loads(notebook.read_text())["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")
    code, count = re.subn(r"scattered-digits:\d+", "scattered-digits:200", executed(notebook))
    assert count
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("page", TEXTS)
def test_linked_files_exist(page):
    for path in re.findall(r"\]\(((?!http)[^)#]+)[^)]*\)", FENCE.sub("", TEXTS[page])):
        assert (PAGES[page].parent / path).exists(), path


def test_the_reference_has_every_public_name():
    shown = re.findall(r"^::: ldae\.(\w+)$", TEXTS["reference.md"] + TEXTS["settings.md"], re.M)
    assert sorted(shown) == sorted(set(ldae.__all__) - {"__version__"})


@pytest.mark.parametrize("page", ["reference.md", "settings.md"])
def test_the_reference_names_what_exists(page):
    for path in re.findall(r"^::: (\S+)$", TEXTS[page], re.M):
        module, _, name = path.rpartition(".")
        assert inspect.getdoc(getattr(import_module(module), name)), path
