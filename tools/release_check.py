"""Build the wheel and the source distribution, and check them in a clean environment.

The checks are the files in both, the metadata, ``twine check``, and then, with the wheel installed
outside of the checkout, ``ldae demo`` and the examples of the README and of docs/ that need neither
the network nor a data set. Everything lies in a temporary folder. The first failure ends the check
with status 1 and one sentence.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
RUN = "runs/l_dae"  # the run of the examples
_STAND_INS = {"/data/imagenet": "scattered-digits:200"}  # for data that a clean environment lacks
_NOT_RUN = ("extending.md", "detection.md")  # parts of files; an extra and hours of training
_WITHOUT_RUN = ("show", "diff")
# They take seconds on a small run.
_WITH_RUN = ("knn", "linear", "logreg", "retrieve", "export", "embed")


def fail(sentence: str) -> NoReturn:
    """End the check with status 1 and a sentence."""
    sys.exit(f"release-check: {sentence}")


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Print and run a command, and return its standard output; end the check if it fails."""
    words = [str(word) for word in command]
    shown = " ".join(shlex.join([Path(words[0]).name, *words[1:]]).split())
    shown = shown if len(shown) < 120 else f"{shown[:116]} ..."
    print(f"release-check: {shown}", flush=True)
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["it printed nothing"]
        fail(f"`{shown}` ended with status {done.returncode}: {lines[-1]}")
    return done.stdout


def new_environment(folder: Path) -> Path:
    """Create a virtual environment with the newest pip, and return the folder of its programs."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    return programs


def check_files(archive: Path, tracked: list[str], version: str) -> None:
    """Check that the wheel has the whole package and nothing else, and the other one all of git."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            found = set(wheel.namelist())
        about = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
        wanted = {name for name in tracked if name.startswith("ldae/")}
        wanted |= {f"ldae-{version}.dist-info/{name}" for name in about}
    else:
        with tarfile.open(archive) as source:
            found = {member.name.partition("/")[2] for member in source if not member.isdir()}
        wanted = {*tracked, "PKG-INFO"}
    for name in sorted(wanted - found):
        fail(f"{archive.name} lacks {name}")
    for name in sorted(found - wanted):
        fail(f"{archive.name} holds {name}, which does not belong there or is not known to git")


def read_metadata(wheel: Path) -> Message:
    """Return the core metadata of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def check_metadata(metadata: Message) -> None:
    """Check the license, the addresses, and that the Python versions agree with each other."""
    if metadata["License-Expression"] != "Apache-2.0":
        fail(f"the license in the metadata is {metadata['License-Expression']}, not Apache-2.0")
    versions = re.findall(r"Python :: (3\.\d+)$", "\n".join(classifiers(metadata)), re.M)
    if not versions or metadata["Requires-Python"] != f">={versions[0]}":
        fail(f"Requires-Python {metadata['Requires-Python']} is not the first of {versions}")
    for entry in metadata.get_all("Project-URL", []):
        if not re.fullmatch(r"[^,]+, https://\S+", entry):
            fail(f"the project URL {entry!r} is no https address")


def classifiers(metadata: Message) -> list[str]:
    """Return the trove classifiers of a distribution."""
    return metadata.get_all("Classifier", [])


def check_version(version: str, changelog: str, tag: str = "") -> None:
    """Check that the changelog has the version, or that it is unreleased; a tag must be of it."""
    if tag and tag != f"v{version}":
        fail(f"the tag is {tag}, and the version in ldae/__init__.py is {version}")
    headings = re.findall(r"^## \[(.+?)\]", changelog, re.M)
    if version not in headings and (tag or "Unreleased" not in headings):
        fail(f"CHANGELOG.md has no section for {version}")


def example_pages() -> str:
    """Return the text of the README and of the pages in docs/ whose examples can run."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    pages = [page for page in pages if page.name not in _NOT_RUN]
    return "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *pages))


def offline_commands(text: str) -> list[list[str]]:
    """Return the shell examples that can run on the demo's run, with made images for real ones."""
    commands = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["ldae"]:
                continue
            if words[1] in _WITHOUT_RUN or (words[1] in _WITH_RUN and words[2] == RUN):
                commands.append([_STAND_INS.get(word, word) for word in words])
    return [list(words) for words in dict.fromkeys(map(tuple, commands))]


def python_examples(text: str) -> list[str]:
    """Return the Python examples, with made images in place of real ones."""
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    for name, stand_in in _STAND_INS.items():
        examples = [example.replace(name, stand_in) for example in examples]
    return examples


def check_installed(programs: Path, work: Path, version: str) -> None:
    """Check the installed wheel in the folder ``work``: version, demo and examples."""
    work.mkdir()
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    own |= {"HOME": str(work), "TMPDIR": str(work), "HF_HUB_OFFLINE": "1"}
    own |= {"PATH": f"{programs}{os.pathsep}{own['PATH']}"}
    own.pop("XDG_CACHE_HOME", None)

    def ldae(*words: str) -> str:
        return run(programs / "ldae", *words, cwd=work, env=own)

    if (printed := ldae("--version").strip()) != version:
        fail(f"the installed `ldae --version` prints {printed}, and the wheel is of {version}")
    ldae("demo", "--epochs", "0.05", "--run", RUN)
    pages = example_pages()
    for _, *words in offline_commands(pages):
        ldae(*words)
    for example in python_examples(pages):
        run(programs / "python", "-c", example, cwd=work, env=own)


def release_check(folder: Path, tag: str, keep: Path | None) -> None:
    """Do all checks in an empty folder; at the end copy both distributions to ``keep``."""
    tracked = run("git", "ls-files", "-z").split("\0")[:-1]
    programs = new_environment(folder / "tools")
    run(programs / "python", "-m", "pip", "install", "--quiet", "build", "twine")
    # The wheel is built from the source distribution, which proves that nothing is missing there.
    run(programs / "python", "-m", "build", "--outdir", folder / "dist", ROOT)
    source, wheel = sorted((folder / "dist").iterdir(), key=lambda path: path.suffix)
    metadata = read_metadata(wheel)
    check_metadata(metadata)
    version = metadata["Version"]
    check_version(version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), tag)
    for archive in (source, wheel):
        check_files(archive, tracked, version)
    run(programs / "python", "-m", "twine", "check", "--strict", source, wheel)
    programs = new_environment(folder / "clean")
    run(programs / "python", "-m", "pip", "install", "--quiet", wheel)
    check_installed(programs, folder / "work", version)
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        for archive in (source, wheel):
            shutil.copy(archive, keep)
    print(f"release-check: {source.name} and {wheel.name} are ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tag", default="", help="the tag of the release, such as v0.1.0")
    parser.add_argument("--keep", type=Path, help="folder for the checked distributions")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("release-check: stopped"))  # and clean up
    with tempfile.TemporaryDirectory() as folder:
        release_check(Path(folder).resolve(), args.tag, args.keep)


if __name__ == "__main__":
    main()
