import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from ldae import files
from ldae.errors import InputError


def test_write_replaces_a_file_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    files.write_json(path, {"name": "größer", "k": (1, 2)})
    assert json.loads(path.read_text()) == {"name": "größer", "k": [1, 2]}

    def full_disk(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="file.json cannot be written: No space left on device"):
        files.write_json(path, {})
    assert json.loads(path.read_text())["name"] == "größer"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def test_several_writers_of_a_file_wait_for_each_other(tmp_path):
    """As jobs that fill one table. Each content is whole, and no writer fails."""
    path, contents = tmp_path / "table.json", [bytes([number]) * 50_000 for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial(files.write, path), contents * 20))
    assert path.read_bytes() in contents and [*tmp_path.iterdir()] == [path]


def test_names_that_are_no_utf_8_are_written_with_jsons_escapes(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    files.write_json(tmp_path / "record.json", {"classes": [name, "café"]})
    assert files.read_object(tmp_path / "record.json") == {"classes": [name, "café"]}


def test_a_partial_folder_is_empty_and_does_not_stay(tmp_path):
    path, left = tmp_path / "new" / "out", tmp_path / "new" / "out.partial"
    left.mkdir(parents=True)
    (left / "of a killed process").touch()
    with files.partial_folder(path) as folder:
        assert folder == left and not list(folder.iterdir())
        (folder / "file").write_text("whole")
        folder.rename(path)
    assert [*tmp_path.rglob("file*")] == [path / "file"]
    with pytest.raises(KeyboardInterrupt), files.partial_folder(path) as folder:
        (folder / "file").write_text("other")
        raise KeyboardInterrupt
    assert [*path.parent.iterdir()] == [path] and (path / "file").read_text() == "whole"


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"[1]", b"null", b'{"a": "\xff"}'])
def test_a_missing_or_damaged_object_reads_as_an_empty_one(content, tmp_path):
    path = tmp_path / "object.json"
    if content is not None:
        path.write_bytes(content)
    assert files.read_object(path) == {}
    files.write_json(path, {"a": [1]})
    assert files.read_object(path) == {"a": [1]}
