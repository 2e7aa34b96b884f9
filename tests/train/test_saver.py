import threading
import time

import pytest
import torch

from ldae.errors import InputError
from ldae.runs.checkpoints import Checkpoints
from ldae.train.saver import Saver


class Slow(Checkpoints):
    """Checkpoints whose saving waits for the event ``disk``."""

    def __init__(self, run):
        super().__init__(run)
        self.disk = threading.Event()

    def save(self, state):
        assert self.disk.wait(10)
        if state["images_seen"] == 13:
            raise InputError("the disk is full")
        return super().save(state)


def state(seen, weight=1.0):
    model = {"w": torch.full((3,), weight), "count": torch.tensor(seen)}
    return {"images_seen": seen, "model": model, "average": None, "optimizer": {}, "describe": {}}


def test_a_save_returns_at_once_and_the_next_one_waits_for_it(tmp_path):
    slow = Slow(tmp_path)
    with Saver(slow) as saver:
        saver.save(state(8))
        saver.check()
        assert slow.paths() == []
        threading.Timer(0.2, slow.disk.set).start()
        saver.save(state(16))
        assert len(slow.paths()) == 1 or slow.load()["images_seen"] == 16
    assert [path.name for path in slow.paths()] == [f"images-{n:012}.pt" for n in (8, 16)]


@pytest.mark.parametrize("how", ["check", "save", "wait", "end"])
def test_the_error_of_a_write_is_raised_by_the_next_call(how, tmp_path):
    slow = Slow(tmp_path)
    slow.disk.set()
    with pytest.raises(InputError, match="the disk is full"), Saver(slow) as saver:
        saver.save(state(8))
        saver.save(state(13))
        if how == "check":
            until = time.monotonic() + 10
            while time.monotonic() < until:
                saver.check()
        elif how != "end":
            saver.save(state(16)) if how == "save" else saver.wait()
    assert slow.load()["images_seen"] == 8


def test_an_error_of_the_disk_does_not_hide_an_error_of_the_training(tmp_path):
    slow = Slow(tmp_path)
    with pytest.raises(RuntimeError, match="of the training"), Saver(slow) as saver:
        saver.save(state(13))
        slow.disk.set()
        raise RuntimeError("of the training")


def test_a_write_is_finished_when_an_exception_ends_the_training(tmp_path):
    slow = Slow(tmp_path)
    with pytest.raises(KeyboardInterrupt), Saver(slow) as saver:
        saver.save(state(8))
        threading.Timer(0.1, slow.disk.set).start()
        raise KeyboardInterrupt
    assert slow.load()["images_seen"] == 8


def test_nan_weights_are_not_saved(tmp_path):
    with pytest.raises(InputError, match="w is not a number after image 8, and this state is not"):
        with Saver(Checkpoints(tmp_path)) as saver:
            saver.save(state(8, weight=float("nan")))
    assert Checkpoints(tmp_path).paths() == []
