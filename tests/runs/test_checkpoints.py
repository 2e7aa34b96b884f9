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
    (path.parent / "images-000000000012.pt.partial").write_bytes(path.read_bytes()[:50])
    assert checkpoints.load()["images_seen"] == 8
    checkpoints.save(state(16))
    assert [p.name for p in sorted(path.parent.iterdir())] == [
        "images-000000000008.pt",
        "images-000000000016.pt",
    ]


@pytest.mark.parametrize(
    "number, told", [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")]
)
@pytest.mark.parametrize("where", ["open", "write", "fsync"])
def test_a_disk_that_refuses_is_told_and_loses_nothing(tmp_path, monkeypatch, where, number, told):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state(8))

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    if where == "open":
        monkeypatch.setattr("builtins.open", refuse)
    else:
        target = {"write": "torch.save", "fsync": "os.fsync"}[where]
        monkeypatch.setattr(target, refuse)
    with pytest.raises(InputError, match=f"images-000000000016.pt .*{told}.*000000000008.pt"):
        checkpoints.save(state(16))
    monkeypatch.undo()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["images-000000000008.pt"]
    assert checkpoints.load()["images_seen"] == 8


def truncated(whole: bytes, place: int) -> bytes:
    return whole[:place]


def flipped(whole: bytes, place: int) -> bytes:
    return whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]


def zeroed(whole: bytes, place: int) -> bytes:
    """As a machine that lost its power leaves a file: of its length, and empty from some page on."""
    return whole[:place] + bytes(len(whole) - place)


@pytest.mark.parametrize("damage", [truncated, flipped, zeroed])
def test_a_damaged_file_is_never_believed(damage, tmp_path, capsys):
    """At random places: the one before is used with a sentence, or nothing was lost by the damage."""
    checkpoints = Checkpoints(tmp_path)
    before, newest = checkpoints.save(state(8)), checkpoints.save(state(16))
    whole, told = newest.read_bytes(), 0
    for place in [0, *(random.randrange(len(whole)) for _ in range(40))]:
        newest.write_bytes(damage(whole, place))
        found = checkpoints.load()
        assert found["model"]["w"].tolist() == [found["images_seen"]] * 3
        line = capsys.readouterr().out
        assert (found["images_seen"] == 8) == bool(line)
        if line:
            assert line.count("\n") == 1 and f"{newest} is damaged (" in line
            assert line.endswith(f"{before.name} before it is used instead\n")
            told += 1
        assert newest.read_bytes() == damage(whole, place)
    assert told > (10 if damage is flipped else 35)  # half of so small a file is padding


def test_every_bit_of_the_tensors_counts(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(8))
    path = checkpoints.save(state(16))
    whole = path.read_bytes()
    start = whole.index(torch.full((3,), 16.0).numpy().tobytes())
    for place in range(start, start + 12):
        path.write_bytes(flipped(whole, place))
        assert checkpoints.load()["images_seen"] == 8, place


def test_where_all_are_damaged_nothing_is_touched(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for seen in (8, 16):
        path = checkpoints.save(state(seen))
        path.write_bytes(path.read_bytes()[:100])
    before = {path: path.read_bytes() for path in checkpoints.paths()}
    with pytest.raises(
        InputError, match="images-000000000016.pt is damaged .*no whole one"
    ) as told:
        checkpoints.load()
    assert "\n" not in str(told.value)
    assert {path: path.read_bytes() for path in checkpoints.folder.iterdir()} == before


def test_a_whole_one_is_not_forgotten_for_a_damaged_newer_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state(16)).write_bytes(b"")
    checkpoints.save(state(8))
    checkpoints.save(state(12))
    assert checkpoints.load()["images_seen"] == 12
    checkpoints.save(state(16))
    assert [path.name for path in checkpoints.paths()] == ["images-000000000016.pt"]


def test_a_checkpoint_that_is_forgotten_while_it_is_read_is_no_damage(tmp_path, monkeypatch):
    """An evaluation reads the folder of a run that goes on."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state(8))
    stale = checkpoints.paths()
    checkpoints.save(state(16))
    listings = iter([stale, checkpoints.paths()])
    monkeypatch.setattr(checkpoints, "paths", lambda: next(listings))
    assert checkpoints.load()["images_seen"] == 16


def test_the_description_is_read_alone(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.describe() is None
    checkpoints.save(state(8) | {"describe": {"images": 5}})
    checkpoints.save(state(16)).write_bytes(b"")
    assert checkpoints.describe() == {"images": 5}


class Code:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_pickled_code_is_not_run_and_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(8) | {"describe": Code()})
    with pytest.raises(InputError, match="holds pickled code, which is not run here"):
        checkpoints.load()
    assert not (tmp_path / "executed").exists()
