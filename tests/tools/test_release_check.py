"""The check of a release refuses a wrong one in one sentence."""

import importlib.util
import io
import os
import re
import sys
import tarfile
import tempfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "release_check.py"
_spec = importlib.util.spec_from_file_location("release_check", TOOL)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)

TRACKED = ["LICENSE", "ldae/__init__.py", "ldae/py.typed", "tests/test_cli.py"]
ABOUT = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
WHEEL = {*TRACKED[1:3], *(f"ldae-1.2.dist-info/{name}" for name in ABOUT)}
SOURCE = {*TRACKED, "PKG-INFO"}


def refused(match: str):
    """Expect the end of the check: status 1, and one sentence on stderr."""
    return pytest.raises(SystemExit, match=rf"\Arelease-check: [^\n]*{match}[^\n]*\Z")


def wheel(folder: Path, names: set[str]) -> Path:
    path = folder / "ldae-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


def source(folder: Path, names: set[str]) -> Path:
    path = folder / "ldae-1.2.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"ldae-1.2/{name}"), io.BytesIO())
    return path


@pytest.mark.parametrize("pack, names", [(wheel, WHEEL), (source, SOURCE)])
def test_every_file_must_be_there_and_no_other(pack, names, tmp_path):
    tool.check_files(pack(tmp_path, names), TRACKED, "1.2")
    for name in names:
        with refused(f"lacks {re.escape(name)}"):
            tool.check_files(pack(tmp_path, names - {name}), TRACKED, "1.2")
    for name in ("benchmarks/speed.py", "ldae/notes.txt"):
        with refused(f"holds {re.escape(name)}"):
            tool.check_files(pack(tmp_path, names | {name}), TRACKED, "1.2")


@pytest.mark.parametrize(
    "changes, match",
    [
        ({}, None),
        ({"License-Expression": "MIT"}, "MIT, not Apache-2.0"),
        ({"Requires-Python": ">=3.10"}, "Requires-Python >=3.10"),
        ({"Classifier": "Topic :: Printing"}, "Requires-Python >=3.11"),
        ({"Project-URL": "Source, https://host/ldae"}, None),
        ({"Project-URL": "Source, http://host/ldae"}, "no https address"),
    ],
)
def test_metadata_must_agree(changes, match):
    metadata = Message()
    right = {"License-Expression": "Apache-2.0", "Requires-Python": ">=3.11"}
    right["Classifier"] = "Programming Language :: Python :: 3.11"
    for name, value in (right | changes).items():
        metadata[name] = value
    if match is None:
        tool.check_metadata(metadata)
    else:
        with refused(match):
            tool.check_metadata(metadata)


def test_a_tag_needs_its_version_and_a_section_of_the_changelog():
    released = "# Changelog\n\n## [1.2] - 2026-12-01\n"
    tool.check_version("1.2", released)
    tool.check_version("1.2", released, tag="v1.2")
    tool.check_version("1.2", "## [Unreleased]\n")
    with refused("the tag is v1.3, and the version in ldae/__init__.py is 1.2"):
        tool.check_version("1.2", released, tag="v1.3")
    for changelog, tag in (("## [Unreleased]\n", "v1.2"), ("## [1.1]\n", "")):
        with refused("no section for 1.2"):
            tool.check_version("1.2", changelog, tag)


def test_examples_are_those_that_need_no_network_and_no_data():
    text = "```sh\nldae show  # rows\nldae knn runs/l_dae --data /data/imagenet\n"
    text += "ldae knn vit_base_patch16_224.mae --data /data/imagenet\nldae fid runs/l_dae\n```\n"
    show, knn = tool.offline_commands(text)
    assert show == ["ldae", "show"]
    assert knn == ["ldae", "knn", "runs/l_dae", "--data", "scattered-digits:200"]
    assert tool.python_examples('```python\nopen("/data/imagenet")\n```\n') == [
        'open("scattered-digits:200")\n'
    ]


def test_the_pages_have_examples_to_run():
    pages = tool.example_pages()
    commands = tool.offline_commands(pages)
    assert {words[1] for words in commands} == {*tool._WITHOUT_RUN, *tool._WITH_RUN}
    opened = ["export", tool.RUN, "exported"], ["--out", "features.npy"]  # by Python examples
    for words in opened:
        assert any(command[-len(words) :] == words for command in commands), words
    assert len(tool.python_examples(pages)) >= 2


def test_a_command_that_fails_is_named_with_its_last_words():
    assert tool.run(sys.executable, "-c", "print('fine')") == "fine\n"
    with refused("ended with status 1: ValueError: not so"):
        tool.run(sys.executable, "-c", "print('begun')\nraise ValueError('not so')")
    with refused("ended with status 3: it printed nothing"):
        tool.run(sys.executable, "-c", "raise SystemExit(3)")


def test_a_failed_check_leaves_nothing_behind(tmp_path, monkeypatch):
    def check(folder, tag, keep):
        (folder / "dist").mkdir()
        tool.fail(f"{tag} is not good")

    monkeypatch.setattr(tool, "release_check", check)
    monkeypatch.setattr(tool.signal, "signal", lambda *how: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["release_check.py", "--tag", "v1"])
    with refused("v1 is not good"):
        tool.main()
    assert os.listdir(tmp_path) == []
