import errno
import os

import pytest
import torch

from ldae.errors import InputError
from ldae.train.checkpoint import Checkpoints


def state(seen):
    model = {"w": torch.full((3,), float(seen))}
    return {"images_seen": seen, "model": model, "average": None, "optimizer": {}, "describe": {}}


def test_the_newest_is_loaded_without_unpickling(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    for seen in (5, 1_000_000, 80):
        checkpoints.save(state(seen))
    assert checkpoints.load()["images_seen"] == 1_000_000
    opened = torch.load(checkpoints.paths()[0], weights_only=True)
    assert torch.equal(opened["model"]["w"], torch.full((3,), 5.0))


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for seen in range(5):
        checkpoints.save(state(seen))
    assert [torch.load(path)["images_seen"] for path in checkpoints.paths()] == [3, 4]


def test_a_file_that_a_kill_left_half_written_is_not_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(state(8))
    (path.parent / "images-000000000016.partial").write_bytes(path.read_bytes()[:50])
    assert checkpoints.load()["images_seen"] == 8
    checkpoints.save(state(16))
    assert [p.name for p in sorted(path.parent.iterdir())] == [
        "images-000000000008.pt",
        "images-000000000016.pt",
    ]


@pytest.mark.parametrize("where", ["open", "write", "fsync"])
def test_a_full_disk_is_told_and_loses_nothing(tmp_path, monkeypatch, where):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state(8))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "open":
        monkeypatch.setattr("builtins.open", full)
    else:
        target = {"write": "torch.save", "fsync": "os.fsync"}[where]
        monkeypatch.setattr(target, full)
    with pytest.raises(InputError, match="images-000000000016.pt .*No space left.*000000000008.pt"):
        checkpoints.save(state(16))
    monkeypatch.undo()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["images-000000000008.pt"]
    assert checkpoints.load()["images_seen"] == 8


def test_a_damaged_file_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(state(8))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="images-000000000008.pt is damaged"):
        checkpoints.load()
