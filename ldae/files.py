"""Files that are whole or absent, and the hash of a state."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ldae.errors import InputError

PARTIAL = ".partial"  # ending of a file that is being written
PARTS = ".parts"  # ending of the folder in which a file's pieces wait until all are there


def state_hash(state: Mapping[str, Any]) -> str:
    """sha256 over the names, types, shapes and bytes of tensors, in order of the names."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
