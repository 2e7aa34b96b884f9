"""Locks that give a run folder, or a file, to one living process at a time."""

import errno
import fcntl
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ldae.distributed import is_main
from ldae.errors import InputError
from ldae.files import PARTIAL, report_write_errors
from ldae.runs import layout

_HEARTBEAT_SECONDS = 5.0  # between two writes of the holder into its lock file
_TIMEOUT_SECONDS = 30.0  # after so long without a heartbeat, a holder elsewhere counts as dead

# Errors of file systems without locks, or without locks between machines.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of the folder ``run``. On ranks other than 0 this does nothing.

    The operating system locks the file ``running.json`` for the process, and unlocks it when the
    process dies, however it dies. On one machine, no process waits and no stale lock remains.

    Locks between machines may not exist, or may outlive a machine that lost its power. So a lock
    file from another machine is watched for its heartbeat: the holder writes to it every few
    seconds. The clocks of two machines are never compared.

    Raises: InputError, with the holder named, when another process or thread holds the lock.
    """
    if not is_main():
        yield
        return
    if run.exists() and not run.is_dir():
        raise InputError(f"{run} is a file, not a run folder; name another --run")
    path = run / layout.LOCK
    with _reserved(path) as is_free:
        if not is_free:
            raise InputError(_in_use_message(path, _this_process()))
        with report_write_errors(path):
            fd = _acquire(path)
        stop = threading.Event()
        heartbeat = threading.Thread(target=_write_heartbeats, args=(fd, stop), daemon=True)
        heartbeat.start()
        try:
            yield
        finally:
            stop.set()
            heartbeat.join()
            if _is_same_file(path, fd):
                with suppress(OSError):
                    path.unlink()
            os.close(fd)  # this unlocks the file, so it comes last


_reservations: set[Path] = set()
_reserving = threading.Lock()


@contextmanager
def _reserved(path: Path) -> Iterator[bool]:
    """Reserve a file among the threads of this process; yield whether no other one has it.

    The operating system's locks are the process's, so they do not keep its threads apart.
    """
    path = path.resolve()
    with _reserving:
        is_free = path not in _reservations
        _reservations.add(path)
    try:
        yield is_free
    finally:
        if is_free:
            _reservations.remove(path)


def _acquire(path: Path) -> int:
    """Create and lock the lock file, write this process into it, and return its descriptor.

    The file is read through this descriptor only: closing any other descriptor of the same file
    would release the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stale = b""  # content of a lock file without a heartbeat
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        acquired = False
        try:
            lock = try_lock(fd)
            if not _is_same_file(path, fd):  # the last holder has just removed it
                continue
            content = os.pread(fd, 4096, 0)
            holder = _parse_holder(content)
            # Locks between processes of this machine are reliable; otherwise only heartbeats are.
            reliable = lock is not None and holder.get("machine") in (None, _machine_id())
            if reliable and not lock:
                raise InputError(_in_use_message(path, holder))
            if not reliable and content != stale:
                if _has_heartbeat(path, content):
                    raise InputError(_in_use_message(path, holder))
                stale = content
            elif lock is False:
                # A lock that outlived its machine belongs to this file, so try with a new file.
                path.unlink()
            else:
                _write_holder(fd, 0)
                acquired = True
                return fd
        finally:
            if not acquired:
                os.close(fd)


def try_lock(fd: int) -> bool | None:
    """Lock a file without waiting; return whether that succeeded.

    The result is None when the file system has no locks.

    The lock belongs to this process alone. Data workers, which may outlive it for seconds, do not
    inherit the lock.
    """
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


@contextmanager
def open_partial(path: Path) -> Iterator[BinaryIO]:
    """Open the file that becomes ``path`` when it is published, and keep all others out.

    It is new, or what an earlier start has left. Missing folders are created.

    Raises: InputError when another process or thread has it open.
    """
    partial = path.with_name(path.name + PARTIAL)
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    # Closing any other descriptor of the file would release its lock, so it is opened only once.
    with _reserved(partial) as is_free:
        if not is_free:
            raise InputError(f"{path} is being written by another thread of this process")
        with open(partial, "r+b") as file:
            if try_lock(file.fileno()) is False:
                raise InputError(f"{path} is being written by another process")
            yield file


def _is_same_file(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _parse_holder(content: bytes) -> dict:
    """Return the record of a lock file, or {} while its first holder is still writing it."""
    with suppress(ValueError):
        return dict(json.loads(content))
    return {}


def _has_heartbeat(path: Path, content: bytes) -> bool:
    """Return whether a lock file changes within the timeout.

    The file is opened anew each time, because a network file system then reads it from the server.
    """
    holder = _parse_holder(content)
    print(
        f"{path}: process {holder.get('process', '?')} on {holder.get('host', '?')} used this run "
        f"and did not record its end; waiting {_TIMEOUT_SECONDS:g} s to see whether that process "
        "is alive",
        flush=True,
    )
    until = time.monotonic() + _TIMEOUT_SECONDS
    while time.monotonic() < until:
        time.sleep(_TIMEOUT_SECONDS / 20)
        try:
            if path.read_bytes() != content:
                return True
        except FileNotFoundError:  # the holder has ended and removed it
            return False
    return False


def _in_use_message(path: Path, holder: dict) -> str:
    who = "another process"
    if holder:
        who = (
            f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('since')}"
        )
    return f"run folder {path.parent} is in use by {who}; stop it first, or name another --run"


def _machine_id() -> str:
    """Return an id that changes with each boot; the host names of containers can be the same."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()


_SINCE = time.strftime("%Y-%m-%d %H:%M:%S %z")  # only for messages


def _this_process() -> dict:
    return {
        "process": os.getpid(),
        "host": platform.node(),
        "machine": _machine_id(),
        "since": _SINCE,
    }


def _write_holder(fd: int, beat: int) -> None:
    content = (json.dumps(_this_process() | {"beat": beat}) + "\n").encode()
    os.pwrite(fd, content, 0)
    os.ftruncate(fd, len(content))
    os.fsync(fd)  # so that other machines can read it from the server


def _write_heartbeats(fd: int, stop: threading.Event) -> None:
    beat = 0
    while not stop.wait(_HEARTBEAT_SECONDS):
        beat += 1
        with suppress(OSError):  # a full disk is reported where checkpoints are saved
            _write_holder(fd, beat)
