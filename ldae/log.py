"""What a run tells: the environment record, JSON files that are whole or absent, short formats."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from ldae.errors import InputError

JOBS = "jobs"  # folder of a run folder: the jobs that were sent from it
GIT = "git.json"  # beside a copy of this package: the checkout that it was made of
PARTIAL = ".partial"  # ending of a file that is being written
PARTS = ".parts"  # ending of the folder in which a file's pieces wait until all are there
_PACKAGES = (
    "ldae",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scikit-learn",
    "faiss-cpu",
    "torch-fidelity",
    "diffusers",
    "pillow",
)


def environment(device: object = None) -> dict:
    """Versions, processor, device and git state: what a reader needs to judge a number."""
    import torch

    record = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "device": str(device or "cpu"),
        "git": git_state(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    if str(device).startswith("cuda"):
        record["gpu"] = torch.cuda.get_device_name(device)
        record["cuda"] = torch.version.cuda
    return record


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_state() -> dict | None:
    """Commit and cleanness of the checkout that the package runs from; None when installed."""
    here = Path(__file__).resolve().parent
    if (here.parent / GIT).is_file():
        return json.loads((here.parent / GIT).read_text(encoding="utf-8"))

    def git(*args: str) -> str:
        command = ["git", "-C", str(here), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "log.py"):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def state_hash(state: Mapping[str, Any]) -> str:
    """sha256 over the names, types, shapes and bytes of tensors, in order of the names."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def progress(total: int, what: str) -> Any:
    """A tqdm bar on rank 0, which a log file gets a line of only now and then."""
    from tqdm import tqdm

    from ldae.distributed import is_main

    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=what, leave=False, disable=not is_main(), mininterval=seconds)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write ``path`` (a full disk, no permission) into a sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} can not be written: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Whether ``path`` could be made, before the work whose result it is to take.

    Raises: InputError when it could not.
    """
    above = path
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{path} can not be written: {above} is no folder that can be written to")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when it is written: flushed to the disk, then renamed.

    Raises: OSError when the disk does not take it; what was there before stays.
    """
    aside = path.with_name(path.name + PARTIAL)
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def write(path: Path, content: bytes) -> None:
    """Make ``path`` hold ``content``, wholly or not at all.

    Raises: InputError when it can not be written; what was there before stays.
    """
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)


def write_json(path: Path, value: object) -> None:
    """``write`` for JSON."""
    write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def duration(seconds: float) -> str:
    """``93784`` as ``1d 02:03:04``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02d}:{minute:02d}:{second:02d}"
    return f"{days}d {clock}" if days else clock
