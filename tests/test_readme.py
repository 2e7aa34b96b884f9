"""The commands and links of the README are right."""

import functools
import inspect
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from ldae import cli, launch
from ldae.cluster import settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [line.partition("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
LDAE = [command for command in COMMANDS if re.search(r"\bldae (?!/)", command)]


def test_the_readme_has_commands():
    assert len(LDAE) >= 6 and "make demo" in COMMANDS and "make test" in COMMANDS


@pytest.mark.parametrize("command", LDAE)
def test_the_command_line_accepts_it(command, monkeypatch):
    """The function of the command is called with these arguments; here it does nothing."""
    called = []
    for name in (command.replace("-", "_") for command in cli.COMMANDS):
        module = f"ldae.commands.{name}"
        original = getattr(import_module(module), name)

        @functools.wraps(original)
        def nothing(*args, original=original, **kwargs):
            inspect.signature(original).bind(*args, **kwargs)
            called.append(original.__name__)

        monkeypatch.setattr(f"{module}.{name}", nothing)
    monkeypatch.setattr("ldae.finetuning.recipes.default_size", lambda backbone: "B")  # opens it
    words = shlex.split(command)
    words, flags = settings.split_flags(words)
    settings.parse_flags(flags)
    words, _ = launch.split_devices(words)  # else the command would run in ranks
    name, *rest = words[words.index("ldae") + 1 :]
    assert cli.main([name, *rest]) == 0
    assert called == [name.replace("-", "_")]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_the_makefile_has_the_target(command):
    assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text()


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_linked_files_exist():
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).exists(), path
