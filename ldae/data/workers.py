"""Worker processes that read samples, and the shared memory in which they hand over images."""

import itertools
import math
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ldae.errors import InputError

_PREFETCHED = 2  # pieces that each worker may have ready, PyTorch's default
_SLOTS = _PREFETCHED + 1  # of each worker: the main process copies one more piece

# With fork, workers start in milliseconds and share the source's index with this process. Fork is
# safe here because workers only decode and copy, on one thread. They use neither the GPU nor the
# OpenMP pools of torch and faiss, whose threads do not survive a fork. The method is named because
# Python 3.14 changes the default, and only on Linux because macOS' frameworks forbid fork.
_START = "fork" if sys.platform == "linux" else "spawn"

SHARED_BYTES = 48_000_000
"""Shared memory for images in flight, over all ranks of a machine; containers often have 64 MB."""


class Batch(NamedTuple):
    """What one forward sees."""

    images: torch.Tensor  # (B, C, H, W) uint8, or latents (B, 1 or 2, N, dim) float16
    targets: Any  # labels (B,) int64, -1 when unlabelled; or what Source.target is in this source
    positions: torch.Tensor  # (B,) int64, in the endless training order, or indices in evaluation
    bad: list[tuple[str, str]]  # images that could not be decoded and were replaced: name, reason


Sample = tuple[torch.Tensor, Any, int, list[tuple[str, str]]]  # image, target, position, bad


def load(
    dataset: Dataset, batches: Iterable[Sequence[int]], workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield the batches of a data set, read by ``workers`` processes, or by this one if it is 0.

    An item of ``dataset`` is a ``Sample``, or an InputError, which is raised here. At most as many
    processes are started as there are CPUs.

    Raises: InputError for a wrong number of workers and when a worker process dies, and the errors
        among the items.
    """
    if workers < 0:
        raise InputError(f"workers must be at least 0, not {workers}")
    workers = min(workers, available_cpus())
    slots = _Slots(workers)
    pieces = _Pieces(batches, slots.size)
    loader = DataLoader(
        dataset,
        batch_sampler=pieces,
        num_workers=workers,
        prefetch_factor=_PREFETCHED if workers else None,
        collate_fn=slots.collate,
        worker_init_fn=_ignore_signals,
        multiprocessing_context=_START if workers else None,
        generator=torch.Generator(),  # drawing from the global generator would change the training
    )
    return _joined(_loaded(loader, slots), pieces, pin_memory)


class _Slots:
    """Shared memory in which workers hand over the images of their pieces.

    It is used again and again: memory that is shared anew for each piece takes several times as
    long as the copy. Each worker fills its slots in turn. It gets a piece when the main process
    takes the piece before the last, so the main process has copied the piece that was in the slot.
    """

    def __init__(self, workers: int) -> None:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.size = SHARED_BYTES // (ranks * workers * _SLOTS) if workers else sys.maxsize
        words = math.ceil(self.size / 8) if workers else 0  # so that any numbers are aligned
        self.memory = torch.empty(workers, _SLOTS, 8 * words, dtype=torch.uint8)
        self.memory.share_memory_()
        self.filled = 0  # by this worker

    def collate(self, samples: list[Sample | InputError]) -> Batch | InputError:
        """Join samples to a piece; its images are the place in the memory if they fit there."""
        for sample in samples:
            if isinstance(sample, InputError):
                return sample
        images, targets, positions, bad = zip(*samples)
        skipped = list(itertools.chain(*bad))
        # Targets and positions stay plain values. To share a tensor, a worker has a thread that
        # prints its error when the main process ends first.
        return Batch(self._put(images), targets, positions, skipped)

    def _put(self, images: tuple[torch.Tensor, ...]) -> torch.Tensor | tuple:
        worker, first = get_worker_info(), images[0]
        if worker is None or len(images) * first.nbytes > self.size:
            return torch.stack(images)
        place = (worker.id, self.filled % _SLOTS, (len(images), *first.shape), first.dtype)
        self.filled += 1
        torch.stack(images, out=self.get(place))
        return place

    def get(self, place: tuple[int, int, tuple[int, ...], torch.dtype]) -> torch.Tensor:
        """Return the images in a slot of a worker, a view (n, C, H, W)."""
        worker, slot, shape, dtype = place
        size = math.prod(shape) * dtype.itemsize
        return self.memory[worker, slot, :size].view(dtype).view(shape)


class _Pieces:
    """Batches cut into pieces, to bound the memory that workers share with their ranks.

    A piece is one task of a worker. ``sizes`` has the sizes of the batches that were cut so far.
    The first pieces have one image, until ``image_bytes`` is known.
    """

    def __init__(self, batches: Iterable[Sequence[int]], most_bytes: int) -> None:
        self.batches, self.most_bytes = batches, most_bytes
        self.sizes: deque[int] = deque()
        self.image_bytes: int | None = None

    def __iter__(self) -> Iterator[Sequence[int]]:
        for batch in self.batches:
            self.sizes.append(len(batch))
            while len(batch):
                size = self._largest
                yield batch[:size]
                batch = batch[size:]

    @property
    def _largest(self) -> int:
        """The number of images that a piece may have."""
        return max(self.most_bytes // (self.image_bytes or self.most_bytes), 1)


def _loaded(loader: DataLoader, slots: _Slots) -> Iterator[Batch]:
    """Yield the loader's pieces; raise errors that are values and errors of dead workers."""
    with report_dead_worker():
        try:
            for piece in loader:
                if isinstance(piece, InputError):
                    raise piece
                if isinstance(piece.images, tuple):
                    piece = piece._replace(images=slots.get(piece.images))
                yield piece
        except (EOFError, ConnectionError) as error:  # from the pipe of a dead worker
            raise RuntimeError(f"DataLoader worker: {error}") from error


def _joined(loaded: Iterator[Batch], pieces: _Pieces, pin_memory: bool) -> Iterator[Batch]:
    """Join pieces to batches. A piece is copied as it comes, which frees its shared memory."""
    for piece in loaded:
        pieces.image_bytes = max(piece.images[0].nbytes, 1)
        size = pieces.sizes.popleft()
        images = torch.empty(
            size, *piece.images.shape[1:], dtype=piece.images.dtype, pin_memory=pin_memory
        )
        filled, targets, positions, bad = 0, [], [], []
        while True:
            images[filled : filled + len(piece.images)] = piece.images
            filled += len(piece.images)
            targets += piece.targets
            positions += piece.positions
            bad += piece.bad
            if filled == size:
                break
            piece = next(loaded)
        yield Batch(images, _collate_targets(targets), torch.tensor(positions), bad)


def _collate_targets(targets: list[Any]) -> torch.Tensor | list:
    """Return numbers and tensors as one tensor (B, ...), and other trees as a list of B trees.

    A tree is never stacked, since the sizes of its tensors may differ from image to image.
    """
    if isinstance(targets[0], int):
        return torch.tensor(targets)
    return torch.stack(targets) if isinstance(targets[0], torch.Tensor) else list(targets)


@contextmanager
def report_dead_worker() -> Iterator[None]:
    """Raise InputError in place of torch's error about a dead data worker.

    torch raises that error in a signal handler, at any place of the main process.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        # Spawned workers import the script that started them, which must not start workers again.
        guard = "; a script needs `if __name__ == '__main__':`" if _START == "spawn" else ""
        raise InputError(
            "a data worker was killed, most often because memory or shared memory (/dev/shm) ran "
            f"out: use fewer workers{guard}"
        ) from error


def available_cpus() -> int:
    """Return the number of CPUs of this process; more workers would only wait for each other."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _ignore_signals(worker: int) -> None:
    """Ignore stop signals: all processes get them, and the main process decides."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
