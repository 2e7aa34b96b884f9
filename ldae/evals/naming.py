"""The folder of an evaluation's results, named by the task, the images and the changed settings.

The weights are not in the name: the results of a newer checkpoint replace those of an older one.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldae.backbones.open import backbone_folder
from ldae.runs import layout
from ldae.tree import difference

_LONGEST = 200  # bytes of a name; file systems allow 255, and suffixes follow
# Settings that do not change the numbers, or that a folder's name has in words.
_NOT_IN_NAMES = ("random_init", "out", "save_stats", "batch_size", "workers", "device")


def default_folder(
    task: str, spec: str, data: str, eval_data: str, *settings: Any, random_init: bool = False
) -> Path:
    """Return the folder of results that have no ``out``.

    Args:
        task: the name of the evaluation.
        spec: the backbone.
        data: the images that are learned from or searched.
        eval_data: the images that are graded.
        settings: the protocol and the setup.
        random_init: whether the weights are random.
    """
    parts = [task, file_name(data)]
    if eval_data != data:
        parts += ["on", file_name(eval_data)]
    if random_init:
        parts.append("random-init")
    name = "-".join(dict.fromkeys(parts + changes(*settings)))
    return unshared_folder(
        results_home(spec) / shortened(name),
        (data, eval_data),
        lambda record: (record["data"]["spec"], record["data"]["eval_spec"]),
    )


def unshared_folder(
    folder: Path, specs: tuple[str, ...], specs_of: Callable[[dict], tuple[str, ...]]
) -> Path:
    """Return ``folder``, or a folder with a digest in its name when ``folder`` has other results.

    Data of the same name in another place may have its results there. ``specs_of`` returns the
    specs in the content of a results.json, which are compared with ``specs``.
    """
    with suppress(OSError, ValueError, TypeError, KeyError):
        record = json.loads((folder / layout.RESULTS).read_text(encoding="utf-8"))
        if specs_of(record) != specs:
            digest = hashlib.sha256("\0".join(specs).encode()).hexdigest()[:8]
            return folder.with_name(f"{folder.name}-{digest}")
    return folder


def shortened(name: str) -> str:
    """Return a name of a file that no file system refuses: the end of a long one is a digest."""
    if len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name.encode()[: _LONGEST - 13].decode(errors='ignore')}-{digest}"


def results_home(spec: str) -> Path:
    """Return the default folder for a backbone's evaluation results."""
    folder = backbone_folder(spec)
    return folder / layout.EVALS if folder else Path(layout.EVALS, file_name(spec))


def changes(*settings: Any) -> list[str]:
    """List ``name=value`` of the settings that change the numbers and are not at their defaults."""
    parts = []
    for part in settings:
        for key, (_, value) in difference(type(part)(), part).items():
            if key not in _NOT_IN_NAMES:
                values = value if isinstance(value, tuple) else (value,)
                parts.append(f"{key}={'-'.join(map(_word, values))}")
    return parts


def _word(value: object) -> str:
    """Return a value as part of a folder's name; numbers keep their sign."""
    return str(value) if isinstance(value, int | float) else file_name(str(value))


def file_name(spec: str) -> str:
    """Return a folder name for ``spec``: the last part of an existing path, else the whole spec."""
    path = Path(os.path.expanduser(spec))
    return re.sub(r"[^\w.=+]+", "-", path.resolve().name if path.exists() else spec).strip("-")
