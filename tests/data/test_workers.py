import os
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from ldae.data import workers
from ldae.data.workers import Batch, load
from ldae.errors import InputError

N = 72


class Numbered(Dataset):
    """Samples whose images have two pixels of the value of their index."""

    def __getitem__(self, i: int) -> tuple:
        return torch.full((1, 1, 2), i, dtype=torch.uint8), -i, i, []


def stream(dataset: Dataset, processes: int, size: int = 12) -> list[Batch]:
    batches = (range(first, first + size) for first in range(0, N, size))
    return list(load(dataset, batches, processes, pin_memory=False))


def check(batches: list[Batch], size: int = 12) -> None:
    """Check that the batches have all samples in order."""
    assert [len(batch.images) for batch in batches] == [size] * (N // size)
    assert torch.cat([batch.images[:, 0, 0, 1] for batch in batches]).tolist() == [*range(N)]
    assert torch.cat([batch.positions for batch in batches]).tolist() == [*range(N)]
    assert torch.cat([batch.targets for batch in batches]).tolist() == [-i for i in range(N)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_share_little_memory_with_all_ranks(ranks, monkeypatch):
    """Two workers of each rank have three slots each. Batches are as without workers."""
    image, most = 2, 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(workers, "SHARED_BYTES", ranks * 2 * 3 * most * image)
    monkeypatch.setattr(workers, "available_cpus", lambda: 2)
    sizes = []

    class Pieces(workers._Pieces):
        def __iter__(self):
            for piece in super().__iter__():
                sizes.append(len(piece))
                yield piece

    monkeypatch.setattr(workers, "_Pieces", Pieces)
    check(stream(Numbered(), 2))
    assert max(sizes) == most and sum(sizes) == N


def test_a_slot_is_filled_again_only_when_its_images_were_copied(monkeypatch):
    """Also when the main process is slow, and for images that are larger than a slot."""

    class SlowCopy(workers._Slots):
        def get(self, place):
            if get_worker_info() is None:
                time.sleep(0.005)  # the workers can run ahead now
            return super().get(place)

    monkeypatch.setattr(workers, "available_cpus", lambda: 2)
    monkeypatch.setattr(workers, "_Slots", SlowCopy)
    for slot in (1, 2, 7):  # bytes; an image has two
        monkeypatch.setattr(workers, "SHARED_BYTES", 2 * 3 * slot)
        check(stream(Numbered(), 2, size=6), size=6)


class Signalled(Numbered):
    """Samples whose workers send themselves signals."""

    def __init__(self, *signals: int):
        self.signals = signals

    def __getitem__(self, i: int) -> tuple:
        for number in self.signals:
            os.kill(os.getpid(), number)
        return super().__getitem__(i)


def test_a_killed_worker_is_reported():
    with pytest.raises(InputError, match="a data worker was killed"):
        stream(Signalled(signal.SIGKILL), 1)


def test_workers_ignore_stop_signals():
    check(stream(Signalled(signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP), 1))


@pytest.mark.parametrize("processes", [0, 1])
def test_an_error_among_the_samples_is_raised_as_it_is(processes):
    class Refused(Numbered):
        def __getitem__(self, i: int) -> tuple | InputError:
            return InputError("sample 30 is bad") if i == 30 else super().__getitem__(i)

    with pytest.raises(InputError, match="^sample 30 is bad$"):
        stream(Refused(), processes)
