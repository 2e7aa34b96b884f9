"""One living process has a run folder: found out without any clock, and after any death."""

import errno
import json
import multiprocessing
import os
import platform
import threading
import time

import pytest

from ldae.errors import InputError
from ldae.runs import lock
from ldae.runs.lock import LOCK, locked

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(lock, "_PATIENCE", 0.6)


@pytest.fixture
def holder(tmp_path):
    """holder(before): another process that has the folder, after ``before()``."""
    started = []

    def start(before=lambda: None):
        ready = FORK.Event()

        def hold():
            before()
            with locked(tmp_path):
                FORK.Process(target=time.sleep, args=(5,)).start()  # a data worker outlives it
                ready.set()
                time.sleep(30)

        process = FORK.Process(target=hold)
        process.start()
        started.append(process)
        assert ready.wait(10)
        return process

    yield start
    for process in started:
        process.kill()


def take(folder) -> float:
    """Seconds that it took."""
    asked = time.monotonic()
    with locked(folder):
        record = json.loads((folder / LOCK).read_text())
        assert record["process"] == os.getpid()
        return time.monotonic() - asked


def refused(folder, process):
    with pytest.raises(InputError) as told:
        take(folder)
    sentence = (
        f"run folder {folder} is in use by process {process.pid} on {platform.node()}, since "
    )
    assert str(told.value).startswith(sentence) and "\n" not in str(told.value)


def test_nothing_is_left_of_a_run_that_ends(tmp_path):
    for _ in range(2):
        assert take(tmp_path / "new") < 0.5
        assert list((tmp_path / "new").iterdir()) == []


def test_a_living_process_is_named_and_a_killed_one_forgotten_at_once(tmp_path, holder):
    process = holder()
    for _ in range(2):  # whoever was refused has not let go of it either
        refused(tmp_path, process)
    process.kill()
    process.join()
    assert take(tmp_path) < 0.5


def elsewhere(monkeypatch, locks: str):
    """What another process does to be on another machine, and what is done here."""

    def there():
        lock._machine = lambda: "another"
        if locks != "between machines":
            lock.fcntl.lockf = absent

    def absent(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if locks == "absent":
        monkeypatch.setattr(lock.fcntl, "lockf", absent)
    return there


@pytest.mark.parametrize("locks", ["between machines", "on each machine alone", "absent"])
def test_another_machine_is_watched(locks, tmp_path, holder, monkeypatch, capsys):
    process = holder(elsewhere(monkeypatch, locks))
    os.utime(tmp_path / LOCK, (0, 0))  # no clock counts, not the server's either
    refused(tmp_path, process)
    process.kill()
    process.join()
    os.utime(tmp_path / LOCK, (2**32, 2**32))
    assert 0.5 < take(tmp_path) < 5
    assert f"process {process.pid} on {platform.node()} had this run" in capsys.readouterr().out


def test_a_lock_that_outlives_its_machine_is_not_believed(tmp_path, monkeypatch):
    """The server waits for a machine that lost its power."""
    path = tmp_path / LOCK
    path.write_text(json.dumps({"process": 5, "host": "gone", "machine": "another"}))
    original = lock._lock

    def outlived(file):
        return False if b"another" in os.pread(file, 4096, 0) else original(file)

    monkeypatch.setattr(lock, "_lock", outlived)
    assert 0.5 < take(tmp_path) < 5


def test_a_process_that_ends_while_it_is_watched_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 20.0)
    path = tmp_path / LOCK
    path.write_text(json.dumps({"process": 5, "host": "there", "machine": "another"}))
    threading.Timer(0.1, path.unlink).start()
    assert take(tmp_path) < 5


def test_a_folder_that_can_not_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file.* cannot be written: "):
        take(tmp_path / "file")
