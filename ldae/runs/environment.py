"""The record of the environment: versions, processor, device and git state."""

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
    here = Path(ldae.__file__).resolve().parent
    if (here.parent / layout.GIT).is_file():
        return json.loads((here.parent / layout.GIT).read_text(encoding="utf-8"))

    def git(*args: str) -> str:
        command = ["git", "-C", str(here), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None
