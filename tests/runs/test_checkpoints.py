import errno
import os
import random

import pytest
import torch

from ldae.errors import InputError
from ldae.runs.checkpoints import Checkpoints


def state(seen):
    model = {"w": torch.full((3,), float(seen))}
    return {"images_seen": seen, "model": model, "average": None, "optimizer": {}, "describe": {}}


def test_the_newest_checkpoint_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    for seen in (5, 1_000_000, 80):
        checkpoints.save(state(seen))
    assert checkpoints.load()["images_seen"] == 1_000_000
    opened = torch.load(checkpoints.paths()[0], weights_only=True)
    assert torch.equal(opened["model"]["w"], torch.full((3,), 5.0))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for seen in range(5):
        checkpoints.save(state(seen))
    assert [torch.load(path)["images_seen"] for path in checkpoints.paths()] == [3, 4]


def test_a_partial_file_is_not_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(state(8))
    (path.parent / "images-000000000012.pt.partial").write_bytes(path.read_bytes()[:50])
    assert checkpoints.load()["images_seen"] == 8
    checkpoints.save(state(16))
    assert [p.name for p in sorted(path.parent.iterdir())] == [
        "images-000000000008.pt",
        "images-000000000016.pt",
    ]


@pytest.mark.parametrize(
    "number, reason", [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")]
)
@pytest.mark.parametrize("where", ["open", "write", "fsync"])
def test_a_disk_error_is_reported_and_loses_nothing(tmp_path, monkeypatch, where, number, reason):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state(8))

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    if where == "open":
        monkeypatch.setattr("builtins.open", refuse)
    else:
        target = {"write": "torch.save", "fsync": "os.fsync"}[where]
        monkeypatch.setattr(target, refuse)
    with pytest.raises(InputError, match=f"images-000000000016.pt .*{reason}.*000000000008.pt"):
        checkpoints.save(state(16))
    monkeypatch.undo()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["images-000000000008.pt"]
    assert checkpoints.load()["images_seen"] == 8


def truncated(content: bytes, place: int) -> bytes:
    return content[:place]


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


def zeroed(content: bytes, place: int) -> bytes:
    """A file after a power failure: of full length, but zero from some page on."""
    return content[:place] + bytes(len(content) - place)


@pytest.mark.parametrize("damage", [truncated, flipped, zeroed])
def test_a_damaged_checkpoint_is_never_loaded(damage, tmp_path, capsys):
    """The checkpoint before it is loaded, unless the damage is only in padding."""
    checkpoints = Checkpoints(tmp_path)
    before, newest = checkpoints.save(state(8)), checkpoints.save(state(16))
    content, reported = newest.read_bytes(), 0
    for place in [0, *(random.randrange(len(content)) for _ in range(40))]:
        newest.write_bytes(damage(content, place))
        loaded = checkpoints.load()
        assert loaded["model"]["w"].tolist() == [loaded["images_seen"]] * 3
        line = capsys.readouterr().out
        assert (loaded["images_seen"] == 8) == bool(line)
        if line:
            assert line.count("\n") == 1 and f"{newest} is damaged (" in line
            assert line.endswith(f"{before.name} is used instead\n")
            reported += 1
        assert newest.read_bytes() == damage(content, place)
    assert reported > (10 if damage is flipped else 35)  # half of so small a file is padding


def test_damage_to_any_byte_of_a_tensor_is_noticed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(8))
    path = checkpoints.save(state(16))
    content = path.read_bytes()
    start = content.index(torch.full((3,), 16.0).numpy().tobytes())
    for place in range(start, start + 12):
        path.write_bytes(flipped(content, place))
        assert checkpoints.load()["images_seen"] == 8, place


def test_if_all_checkpoints_are_damaged_nothing_is_changed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for seen in (8, 16):
        path = checkpoints.save(state(seen))
        path.write_bytes(path.read_bytes()[:100])
    before = {path: path.read_bytes() for path in checkpoints.paths()}
    with pytest.raises(InputError, match="0000016.pt is damaged .*no undamaged one") as error:
        checkpoints.load()
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in checkpoints.folder.iterdir()} == before


def test_a_good_checkpoint_is_not_deleted_because_of_a_damaged_newer_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state(16)).write_bytes(b"")
    checkpoints.save(state(8))
    checkpoints.save(state(12))
    assert checkpoints.load()["images_seen"] == 12
    checkpoints.save(state(16))
    assert [path.name for path in checkpoints.paths()] == ["images-000000000016.pt"]


def test_a_checkpoint_deleted_while_it_is_read_is_no_damage(tmp_path, monkeypatch):
    """An evaluation may read the folder of a running training."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state(8))
    stale = checkpoints.paths()
    checkpoints.save(state(16))
    listings = iter([stale, checkpoints.paths()])
    monkeypatch.setattr(checkpoints, "paths", lambda: next(listings))
    assert checkpoints.load()["images_seen"] == 16


def test_the_description_of_the_newest_readable_checkpoint_is_returned(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.describe() is None
    checkpoints.save(state(8) | {"describe": {"images": 5}})
    checkpoints.save(state(16)).write_bytes(b"")
    assert checkpoints.describe() == {"images": 5}


class Code:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_pickled_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(8) | {"describe": Code()})
    with pytest.raises(InputError, match="holds pickled code, which ldae never executes"):
        checkpoints.load()
    assert not (tmp_path / "executed").exists()
