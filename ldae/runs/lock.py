"""A run folder belongs to one living process at a time."""

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

from ldae.distributed import is_main
from ldae.errors import InputError
from ldae.files import report_write_errors

LOCK = "running.json"
_BEAT, _PATIENCE = 5.0, 30.0  # seconds between two signs of life, and until there should be another

# What a file system answers that has no locks, or none between machines.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the folder ``run``; on ranks other than 0 it does nothing.

    The system locks the file ``running.json`` for the process and lets go with its death, however it
    dies, so on one machine nothing waits and nothing is left over. Locks between machines can be
    absent, or outlive a machine that lost its power. So where the file is another machine's, it is
    watched: its process writes something new into it every few seconds. No clock is compared with
    that of another machine.

    Raises: InputError, naming who holds it, when another process does.
    """
    if not is_main():
        yield
        return
    path = run / LOCK
    with report_write_errors(path):
        file = _take(path)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(file, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _is(path, file):
            with suppress(OSError):
                path.unlink()
        os.close(file)  # and only now can it be had by another


def _take(path: Path) -> int:
    """An open file that this process has locked, and written itself into.

    It is read only through that: to close another one would let go of the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    watched = b""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        taken = False
        try:
            free = _lock(file)
            if not _is(path, file):  # its last holder has just removed it
                continue
            content = os.pread(file, 4096, 0)
            holder = _holder(content)
            # Here the system knows whether the holder lives; elsewhere only the file can tell.
            known = free is not None and holder.get("machine") in (None, _machine())
            if known and not free:
                raise InputError(_in_use(path, holder))
            if not known and content != watched:
                if _changes(path, content):
                    raise InputError(_in_use(path, holder))
                watched = content
            elif free is False:
                path.unlink()  # a lock that outlived its machine stays with the removed file
            else:
                _sign(file, 0)
                taken = True
                return file
        finally:
            if not taken:
                os.close(file)


def _lock(file: int) -> bool | None:
    """Whether this process has the lock now; None where there are no locks.

    It is the process's own: data workers, which may outlive it for seconds, do not inherit it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _is(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _holder(content: bytes) -> dict:
    """What the file says; nothing while it is being written for the first time."""
    with suppress(ValueError):
        return dict(json.loads(content))
    return {}


def _changes(path: Path, content: bytes) -> bool:
    """Whether somebody writes into the file. Opened anew, it is read from the server."""
    holder = _holder(content)
    print(
        f"{path}: process {holder.get('process', '?')} on {holder.get('host', '?')} had this run, and "
        f"did not say that it ended; waiting {_PATIENCE:g} s for a sign of life",
        flush=True,
    )
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        time.sleep(_PATIENCE / 20)
        try:
            if path.read_bytes() != content:
                return True
        except FileNotFoundError:  # it has ended
            return False
    return False


def _in_use(path: Path, holder: dict) -> str:
    who = "another process"
    if holder:
        who = (
            f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('since')}"
        )
    return f"run folder {path.parent} is in use by {who}; end that first, or name another --run"


def _machine() -> str:
    """Of this start of this machine: names of machines can be the same in containers."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()


_SINCE = time.strftime("%Y-%m-%d %H:%M:%S %z")  # for people


def _sign(file: int, beat: int) -> None:
    record = {
        "process": os.getpid(),
        "host": platform.node(),
        "machine": _machine(),
        "since": _SINCE,
        "beat": beat,
    }
    content = (json.dumps(record) + "\n").encode()
    os.pwrite(file, content, 0)
    os.ftruncate(file, len(content))
    os.fsync(file)  # to the server, for the others to read


def _beat(file: int, ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(_BEAT):
        beat += 1
        with suppress(OSError):  # of a full disk, which whoever saves tells of
            _sign(file, beat)
