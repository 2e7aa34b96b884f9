"""Batches for training, where the batch at image n is a pure function of n, and for evaluation."""

import functools
import itertools
import math
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ldae.data.image import BadImage
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.errors import InputError

_PREFETCHED = 2  # pieces that each worker may have ready, PyTorch's default
_SLOTS = _PREFETCHED + 1  # of each worker: the main process copies one more piece

SHARED_BYTES = 48_000_000
"""Shared memory for images in flight, over all ranks of a machine; containers often have 64 MB."""

Transform = Callable[[Image.Image | np.ndarray, np.random.Generator], torch.Tensor]


class Batch(NamedTuple):
    """What one forward sees."""

    images: torch.Tensor  # (B, C, H, W) uint8
    targets: Any  # labels (B,) int64, -1 when unlabelled; or what Source.target is in this source
    positions: torch.Tensor  # (B,) int64, in the endless training order, or indices in evaluation
    bad: list[tuple[str, str]]  # images that could not be decoded and were replaced: name, reason


def train_batches(
    source: Source,
    transform: Transform,
    *,
    seed: int,
    start: int,
    batch_size: int,
    stop: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    micro_batches: int = 1,
    workers: int = 0,
    bad_images: Literal["stop", "skip"] = "stop",
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield the micro batches of ``rank``, starting at image ``start`` of the training order.

    The stream is endless when ``stop`` is None. Otherwise each global batch begins before ``stop``.

    The endless training order contains each image once per epoch: position n is image
    ``epoch_order(seed, n // N, N)[n % N]``, augmented with ``default_rng([seed, n])``. The global
    batch at n has the positions n .. n + ``batch_size`` - 1 and may extend into the next epoch. It
    is split into ``micro_batches`` x ``world_size`` equal pieces, and each rank takes the pieces
    ``micro * world_size + rank``. Every number of ranks and micro batches therefore trains on the
    same images.

    With ``bad_images`` stop, a bad image raises BadImage. With skip, the next readable image in the
    epoch's order replaces the bad image, and ``Batch.bad`` names the bad image and the reason.

    Raises: InputError for invalid settings, when no image of the source is readable, and when a
        worker process dies.
    """
    if batch_size < 1 or batch_size % (micro_batches * world_size):
        raise InputError(
            f"batch_size {batch_size} cannot be split into equal parts for {world_size} processes "
            f"of {micro_batches} micro batches"
        )
    if bad_images not in ("stop", "skip"):
        raise InputError(f"bad_images must be stop or skip, not {bad_images!r}")
    piece = batch_size // (micro_batches * world_size)
    starts = itertools.count(start, batch_size) if stop is None else range(start, stop, batch_size)
    batches = (
        range(first, first + piece)
        for n in starts
        for first in range(n + rank * piece, n + batch_size, world_size * piece)
    )
    dataset = _TrainingOrder(source, transform, seed, skip=bad_images == "skip")
    return _load(dataset, batches, workers, pin_memory)


def eval_batches(
    source: Source, transform: Transform, indices: Sequence[int], batch_size: int, workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield transformed images, labels (-1 when unlabelled) and indices, in the given order.

    The last batch may be smaller. A random transform is seeded with the image's index.

    Raises: BadImage for a bad image, because results without it would not be comparable.
        InputError when a worker process dies.
    """
    batches = (indices[i : i + batch_size] for i in range(0, len(indices), batch_size))
    for batch in _load(_EvaluationOrder(source, transform), batches, workers, pin_memory=False):
        yield batch.images, batch.targets, batch.positions


def crop_batches(
    source: Source, crop: CropTransform, indices: Sequence[int], batch_size: int, workers: int
) -> Iterator[Batch]:
    """Yield crops in the given order. A bad image is black, its target 1; other targets are 0.

    ``Batch.bad`` names the bad images. The last batch may be smaller.

    Raises: InputError when a worker process dies.
    """
    batches = (indices[i : i + batch_size] for i in range(0, len(indices), batch_size))
    return _load(_Crops(source, crop), batches, workers, pin_memory=False)


@functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return the order of the images in one epoch, int64 (length,)."""
    return np.random.default_rng([seed, epoch]).permutation(length)


Sample = tuple[torch.Tensor, Any, int, list[tuple[str, str]]]  # image, target, position, bad


class _EvaluationOrder(Dataset):
    """Samples by index. Errors are values here, for DataLoader would wrap them in tracebacks."""

    def __init__(self, source: Source, transform: Transform):
        self.source = source
        self.transform = transform

    def __getitem__(self, index: int) -> Sample | InputError:
        index = int(index)
        try:
            rng = np.random.default_rng(index)
            return *_image_and_target(self.source, self.transform, index, rng), index, []
        except InputError as error:
            return error


class _Crops(_EvaluationOrder):
    """Crops by index, where a bad image is black."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if isinstance(sample, InputError):
            side = self.transform.img_size
            black = torch.zeros(self.transform.in_chans, side, side, dtype=torch.uint8)
            return black, 1, index, [(self.source.name(index), str(sample))]
        return sample[0], 0, index, []


class _TrainingOrder(Dataset):
    """Samples by position in the endless training order, errors as values."""

    def __init__(self, source: Source, transform: Transform, seed: int, skip: bool):
        self.source = source
        self.transform = transform
        self.seed = seed
        self.skip = skip

    def __getitem__(self, position: int) -> Sample | InputError:
        epoch, place = divmod(position, len(self.source))
        order = epoch_order(self.seed, epoch, len(self.source))
        bad = []
        for attempt in range(len(order)):
            index = int(order[(place + attempt) % len(order)])
            rng = np.random.default_rng([self.seed, position])
            try:
                return *_image_and_target(self.source, self.transform, index, rng), position, bad
            except BadImage as error:
                if not self.skip:
                    return error
                bad.append((self.source.name(index), str(error)))
        return InputError(f"none of the {len(order)} images of {self.source.spec} can be decoded")


def _image_and_target(
    source: Source, transform: Transform, index: int, rng: np.random.Generator
) -> tuple[torch.Tensor, Any]:
    """Return the transformed image ``index`` and its target.

    Raises: BadImage when the image cannot be decoded or does not fit the transform.
    """
    image = source.image(index)
    try:
        tensor = transform(image, rng)
    except InputError as error:
        raise BadImage(f"{source.where(index)} is {error}") from error
    return tensor, source.target(index)


class _Slots:
    """Shared memory in which workers hand over the images of their pieces.

    It is used again and again: memory that is shared anew for each piece takes several times as
    long as the copy. Each worker fills its slots in turn. It gets a piece when the main process
    takes the piece before the last, so the main process has copied the piece that was in the slot.
    """

    def __init__(self, workers: int) -> None:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.size = SHARED_BYTES // (ranks * workers * _SLOTS) if workers else sys.maxsize
        self.memory = torch.empty(workers, _SLOTS, self.size if workers else 0, dtype=torch.uint8)
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
        worker, shape = get_worker_info(), (len(images), *images[0].shape)
        if worker is None or images[0].dtype != torch.uint8 or math.prod(shape) > self.size:
            return torch.stack(images)
        place = (worker.id, self.filled % _SLOTS, shape)
        self.filled += 1
        torch.stack(images, out=self.get(place))
        return place

    def get(self, place: tuple[int, int, tuple[int, ...]]) -> torch.Tensor:
        """Return the images in a slot of a worker, a view (n, C, H, W)."""
        worker, slot, shape = place
        return self.memory[worker, slot, : math.prod(shape)].view(shape)


def _collate_targets(targets: list[Any]) -> torch.Tensor | list:
    """Return numbers and tensors as one tensor (B, ...), and other trees as a list of B trees.

    A tree is never stacked, since the sizes of its tensors may differ from image to image.
    """
    if isinstance(targets[0], int):
        return torch.tensor(targets)
    return torch.stack(targets) if isinstance(targets[0], torch.Tensor) else list(targets)


def _load(
    dataset: Dataset, batches: Iterable[Sequence[int]], workers: int, pin_memory: bool
) -> Iterator[Batch]:
    if workers < 0:
        raise InputError(f"workers must be at least 0, not {workers}")
    # With fork, workers start in milliseconds and share the source's index with this process. Fork
    # is safe here because workers only decode and copy, on one thread. They use neither the GPU nor
    # the OpenMP pools of torch and faiss, whose threads do not survive a fork. The method is named
    # because Python 3.14 changes the default, and only on Linux because macOS' frameworks forbid
    # fork.
    context = "fork" if workers and sys.platform == "linux" else None
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
        multiprocessing_context=context,
        generator=torch.Generator(),  # drawing from the global generator would change the training
    )
    return _joined(_loaded(loader, slots), pieces, pin_memory)


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
        raise InputError(
            "a data worker was killed, most often because memory or shared memory (/dev/shm) ran "
            "out: use fewer workers"
        ) from error


def available_cpus() -> int:
    """Return the number of CPUs of this process; more workers would only wait for each other."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _ignore_signals(worker: int) -> None:
    """Ignore stop signals: schedulers send them to all processes, and the main process decides."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
