"""Files that are written completely or not at all, and hashes of files and state dicts."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ldae.errors import InputError

PARTIAL = ".partial"  # suffix of a file or a folder that is being written
PARTS = ".parts"  # suffix of the folder that holds the parts of a file until all are there


def state_hash(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a state dict as a hexadecimal number.

    It covers the names, types, shapes and bytes of the tensors, in the order of their names.
    """
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content as a hexadecimal number."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing ``path`` (a full disk, no permission) into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Check that the folder ``path`` can be created or written to, before the work that fills it.

    Raises: InputError when its closest existing parent is not a writable folder.
    """
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: {parent} is not a writable folder")


def check_room(path: Path, needed: int) -> None:
    """Check that the disk of ``path``, whose folder exists, has room for ``needed`` more bytes.

    Raises: InputError when it has not.
    """
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise InputError(
            f"{path} needs {format_size(needed)} more, and its disk has {format_size(free)} left"
        )


def format_size(count: int) -> str:
    """Return a number of bytes in GB, or in MB below one GB, such as ``1.5 GB``."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` at the end: flushed to the disk, then renamed.

    Of several processes that write ``path``, one waits for the other, and the last one stands.

    Raises: OSError when the file cannot be written; ``path`` then stays as it was.
    """
    partial = path.with_name(path.name + PARTIAL)
    with _open_alone(partial) as file:
        try:
            yield file
            publish(file, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def _open_alone(path: Path) -> BinaryIO:
    """Open an empty file that nobody else writes. Raises: OSError."""
    while True:
        path.touch()
        try:
            file = open(path, "r+b")
        except FileNotFoundError:
            continue  # another process has renamed it meanwhile
        except OSError:
            path.unlink(missing_ok=True)
            raise
        with suppress(ImportError, OSError):  # Windows and some network disks have no locks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                file.truncate()
                return file
        file.close()


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``, to be renamed to it or emptied; it is gone at the end.

    What a process that was killed has left there is removed first.

    Raises: OSError when the folder cannot be made.
    """
    folder = path.with_name(path.name + PARTIAL)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(file: BinaryIO, path: Path) -> None:
    """Flush an open file to the disk and rename it to ``path``. Raises: OSError when this fails."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename is in the folder
    finally:
        os.close(folder)


def write(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, completely or not at all. Missing folders are created.

    Raises: InputError when the file cannot be written; ``path`` then stays as it was.
    """
    with report_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(path) as file:
            file.write(content)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` to ``path`` as indented JSON, as ``write`` does.

    Bytes of a file's name that are no UTF-8 become JSON's escapes.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write(path, text.encode(errors="backslashreplace"))


def read_object(path: Path) -> dict:
    """Return the object in a JSON file, or {} for a missing or damaged file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def as_json(value: Any) -> Any:
    """Return ``value`` as JSON reads it back: tuples become lists, and keys strings."""
    return json.loads(json.dumps(value))
