"""One living process holds a run folder; the lock needs no clock and survives every death."""

import errno
import json
import os
import platform
import threading
import time
from pathlib import Path

import pytest

from ldae.errors import InputError
from ldae.runs import lock
from ldae.runs.layout import LOCK
from ldae.runs.lock import locked, open_partial


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(lock, "_HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "_TIMEOUT_SECONDS", 0.6)


@pytest.fixture
def holder(fork, tmp_path):
    """holder(before): start a process that calls ``before`` and then holds the folder."""
    started = []

    def start(before=lambda: None):
        ready = fork.Event()

        def hold():
            before()
            with locked(tmp_path):
                fork.Process(target=time.sleep, args=(5,)).start()  # an outliving data worker
                ready.set()
                time.sleep(30)

        process = fork.Process(target=hold)
        process.start()
        started.append(process)
        assert ready.wait(10)
        return process

    yield start
    for process in started:
        process.kill()


def acquire(folder) -> float:
    """Acquire the lock, and return the seconds that this took."""
    start = time.monotonic()
    with locked(folder):
        record = json.loads((folder / LOCK).read_text())
        assert record["process"] == os.getpid()
        return time.monotonic() - start


def assert_refused(folder, process):
    with pytest.raises(InputError) as error:
        acquire(folder)
    holder = f"process {process.pid} on {platform.node()}"
    assert str(error.value).startswith(f"run folder {folder} is in use by {holder}, since ")
    assert "\n" not in str(error.value)


def test_a_run_that_ends_removes_its_lock_file(tmp_path):
    for _ in range(2):
        assert acquire(tmp_path / "new") < 0.5
        assert list((tmp_path / "new").iterdir()) == []


def test_a_living_process_is_named_and_a_killed_one_releases_the_lock_at_once(tmp_path, holder):
    process = holder()
    for _ in range(2):  # a refused process must not release the holder's lock
        assert_refused(tmp_path, process)
    process.kill()
    process.join()
    assert acquire(tmp_path) < 0.5


def test_a_second_thread_is_refused_and_releases_nothing(tmp_path, monkeypatch):
    """The operating system would give it the lock, which is the process's."""
    monkeypatch.chdir(tmp_path)
    with locked(tmp_path / "run"), open_partial(tmp_path / "file") as file:
        for _ in range(2):
            with pytest.raises(InputError, match=f"run is in use by process {os.getpid()} on "):
                acquire(Path("run"))  # the same folder by another name
            with pytest.raises(InputError, match="file is being written by another thread"):
                with open_partial(Path("file")):
                    pass
        assert (tmp_path / "run" / LOCK).is_file() and not file.closed
    assert acquire(tmp_path / "run") < 0.5


def on_another_machine(monkeypatch, locks: str):
    """Return what a holder calls to pretend to be on another machine; prepare this process too."""

    def before():
        lock._machine_id = lambda: "another"
        if locks != "between machines":
            lock.fcntl.lockf = no_locks

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if locks == "none":
        monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
    return before


@pytest.mark.parametrize("locks", ["between machines", "within machines", "none"])
def test_a_holder_on_another_machine_is_watched(locks, tmp_path, holder, monkeypatch, capsys):
    process = holder(on_another_machine(monkeypatch, locks))
    os.utime(tmp_path / LOCK, (0, 0))  # file times must not matter
    assert_refused(tmp_path, process)
    process.kill()
    process.join()
    os.utime(tmp_path / LOCK, (2**32, 2**32))
    assert 0.5 < acquire(tmp_path) < 5
    assert f"process {process.pid} on {platform.node()} used this run" in capsys.readouterr().out


def test_a_lock_that_outlives_its_machine_is_removed(tmp_path, monkeypatch):
    """A file server may keep the lock of a machine that lost its power."""
    path = tmp_path / LOCK
    path.write_text(json.dumps({"process": 5, "host": "gone", "machine": "another"}))
    try_lock = lock.try_lock

    def keep_lock(fd):
        return False if b"another" in os.pread(fd, 4096, 0) else try_lock(fd)

    monkeypatch.setattr(lock, "try_lock", keep_lock)
    assert 0.5 < acquire(tmp_path) < 5


def test_a_longer_record_is_replaced_as_a_whole(tmp_path):
    record = {"process": 5, "host": 50 * "long", "machine": lock._machine_id()}
    (tmp_path / LOCK).write_text(json.dumps(record))
    assert acquire(tmp_path) < 0.5


def test_waiting_ends_when_the_watched_process_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_TIMEOUT_SECONDS", 20.0)
    path = tmp_path / LOCK
    path.write_text(json.dumps({"process": 5, "host": "there", "machine": "another"}))
    threading.Timer(0.1, path.unlink).start()
    assert acquire(tmp_path) < 5


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file, not a run folder; name another --run"):
        acquire(tmp_path / "file")
    with pytest.raises(InputError, match="run.* cannot be written: "):
        acquire(tmp_path / "file" / "run")
