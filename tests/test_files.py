import errno
import json
import os

import pytest

from ldae import files
from ldae.errors import InputError


def test_a_write_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    files.write_json(path, {"name": "größer", "k": (1, 2)})
    assert json.loads(path.read_text()) == {"name": "größer", "k": [1, 2]}

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="file.json can not be written: No space left on device"):
        files.write_json(path, {})
    assert json.loads(path.read_text())["name"] == "größer"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]
