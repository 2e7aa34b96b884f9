"""The record of the environment of a result: versions, processor, device and git state."""

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import ldae
from ldae.runs import layout

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
    """Return versions, processor, device, git state and command: the context of a result."""
    import torch

    from ldae.processor import processor_name, vector_instructions

    record = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in _PACKAGES},
        "cpu": processor_name(),
        "cpu_instructions": vector_instructions(),
        "cpu_threads": torch.get_num_threads(),
        "device": str(device or "cpu"),
        "git": git_state(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    if str(device).startswith("cuda"):
        record["gpu"] = torch.cuda.get_device_name(str(device))
        record["cuda"] = torch.version.cuda
    return record


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state() -> dict | None:
    """Return the commit of the package's checkout, and whether files have uncommitted changes.

    A copy of the package returns the state of its original. None when the package is installed.
    """
    package = Path(ldae.__file__).resolve().parent
    if (package.parent / layout.GIT).is_file():
        return json.loads((package.parent / layout.GIT).read_text(encoding="utf-8"))

    def git(*args: str) -> str:
        command = ["git", "-C", str(package), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None
