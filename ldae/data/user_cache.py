"""Arrays and facts in the user's cache folder, kept from one start to the next."""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ldae.files import open_atomic

_UNUSED_SECONDS = 30 * 24 * 3600  # after which a file is deleted
_FACTS = "facts"  # the name of their array


def read(key: Path) -> tuple[dict[str, np.ndarray], Any] | None:
    """Return the arrays and facts kept for a path, or None if there are none that can be used."""
    path = _file(key)
    if path is None or not path.exists():
        return None
    with suppress(OSError):
        os.utime(path)  # it is in use
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        return arrays, json.loads(arrays.pop(_FACTS).tobytes())
    except Exception:  # numpy does not say how it reports damaged files; they have checksums
        return None


def write(key: Path, arrays: dict[str, np.ndarray], facts: Any) -> None:
    """Keep arrays and facts for a path if that is possible; delete files not used any more."""
    path = _file(key)
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(path) as file:
            encoded = np.frombuffer(json.dumps(facts).encode(), np.uint8)
            np.savez_compressed(file, **arrays, **{_FACTS: encoded})
        for other in path.parent.glob("*.npz"):
            if time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                other.unlink()


def _file(key: Path) -> Path | None:
    """Return the file that is kept for a path, or None without a cache folder."""
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    digest = hashlib.sha256(os.fsencode(os.path.realpath(key))).hexdigest()[:32]
    return Path(home, "ldae", "listings", f"{digest}.npz") if os.path.isabs(home) else None
