import errno
import json
import os

import pytest

from ldae import log
from ldae.errors import InputError


def test_a_write_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    log.write_json(path, {"name": "größer", "k": (1, 2)})
    assert json.loads(path.read_text()) == {"name": "größer", "k": [1, 2]}

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="file.json can not be written: No space left on device"):
        log.write_json(path, {})
    assert json.loads(path.read_text())["name"] == "größer"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def test_durations():
    assert log.duration(5.9) == "00:00:05"
    assert log.duration(3 * 3600 + 62) == "03:01:02"
    assert log.duration(93784) == "1d 02:03:04"


def test_the_environment_tells_versions_and_device():
    record = log.environment("cpu")
    assert record["device"] == "cpu" and record["packages"]["torch"] and record["python"]
    assert record["packages"].keys() >= {"ldae", "timm", "numpy", "faiss-cpu"}
    json.dumps(record)


def test_packages_that_are_missing_are_told_as_missing(monkeypatch):
    monkeypatch.setattr(log, "_PACKAGES", ("no-such-package",))
    assert log.environment()["packages"] == {"no-such-package": None}
