"""Batches for training, where the batch at image n is a pure function of n, and for evaluation."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldae.data.image import BadImage
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.data.workers import Batch, Sample, load
from ldae.errors import InputError

Transform = Callable[[Image.Image | np.ndarray, np.random.Generator], torch.Tensor]


@runtime_checkable
class JointTransform(Protocol):
    """A transform that changes the target with the image, as boxes move with theirs."""

    def joint(
        self, image: Image.Image | np.ndarray, target: Any, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Any]:
        """Return the transformed image, and its target."""


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
    bad_images: Literal["stop", "skip"] | None = None,
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

    ``bad_images`` is the user's setting, or None where there is no such setting. With skip, the
    next readable image in the epoch's order replaces a bad image, and ``Batch.bad`` names the bad
    image and the reason. Otherwise a bad image raises BadImage, and so does a failure of the drive
    in any case.

    Raises: InputError for invalid settings, when no image of the source is readable, and when a
        worker process dies.
    """
    if batch_size < 1 or batch_size % (micro_batches * world_size):
        raise InputError(
            f"batch_size {batch_size} cannot be split into equal parts for {world_size} processes "
            f"of {micro_batches} micro batches"
        )
    if bad_images not in ("stop", "skip", None):
        raise InputError(f"bad_images must be stop or skip, not {bad_images!r}")
    piece = batch_size // (micro_batches * world_size)
    starts = itertools.count(start, batch_size) if stop is None else range(start, stop, batch_size)
    batches = (
        range(first, first + piece)
        for n in starts
        for first in range(n + rank * piece, n + batch_size, world_size * piece)
    )
    dataset = _TrainingOrder(source, transform, seed, bad_images)
    return load(dataset, batches, workers, pin_memory)


def eval_batches(
    source: Source, transform: Transform, indices: Sequence[int], batch_size: int, workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield transformed images, labels (-1 when unlabelled) and indices, in the given order.

    The last batch may be smaller. A random transform is seeded with the image's index.

    Raises: BadImage for a bad image, because results without it would not be comparable.
        InputError when a worker process dies.
    """
    batches = (indices[i : i + batch_size] for i in range(0, len(indices), batch_size))
    for batch in load(_EvaluationOrder(source, transform), batches, workers, pin_memory=False):
        yield batch.images, batch.targets, batch.positions


def crop_batches(
    source: Source, crop: CropTransform, indices: Sequence[int], batch_size: int, workers: int
) -> Iterator[Batch]:
    """Yield crops in the given order. A bad image is black, its target 1; other targets are 0.

    ``Batch.bad`` names the bad images. The last batch may be smaller.

    Raises: BadImage when the drive fails. InputError when a worker process dies.
    """
    batches = (indices[i : i + batch_size] for i in range(0, len(indices), batch_size))
    return load(_Crops(source, crop), batches, workers, pin_memory=False)


@functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return the order of the images in one epoch, int64 (length,)."""
    return np.random.default_rng([seed, epoch]).permutation(length)


class _Samples(Dataset):
    """Samples of a source. Errors are values here, for DataLoader would wrap them in tracebacks."""

    def __init__(self, source: Source, transform: Transform):
        self.source = source
        self.transform = transform
        # Asked once: isinstance of a protocol takes longer than the copy of an image of a cache.
        self._is_joint = isinstance(transform, JointTransform)

    def _read(self, index: int, rng: np.random.Generator) -> tuple[torch.Tensor, Any]:
        """Return the transformed image ``index`` and its target.

        Raises: BadImage when the image cannot be decoded or does not fit the transform.
        """
        image, target = self.source.image(index), self.source.target(index)
        try:
            if self._is_joint:
                return self.transform.joint(image, target, rng)
            return self.transform(image, rng), target
        except InputError as error:
            raise BadImage(f"{self.source.where(index)} is {error}") from error


class _EvaluationOrder(_Samples):
    """Samples by index."""

    def __getitem__(self, index: int) -> Sample | InputError:
        index = int(index)
        try:
            return *self._read(index, np.random.default_rng(index)), index, []
        except InputError as error:
            return error


class _Crops(_EvaluationOrder):
    """Crops by index, where a bad image is black."""

    def __getitem__(self, index: int) -> Sample | InputError:
        sample = super().__getitem__(index)
        if isinstance(sample, BadImage) and sample.is_of_drive:
            return sample
        if isinstance(sample, InputError):
            side = self.transform.img_size
            black = torch.zeros(self.transform.in_chans, side, side, dtype=torch.uint8)
            return black, 1, index, [(self.source.name(index), str(sample))]
        return sample[0], 0, index, []


class _TrainingOrder(_Samples):
    """Samples by position in the endless training order."""

    def __init__(
        self,
        source: Source,
        transform: Transform,
        seed: int,
        bad_images: Literal["stop", "skip"] | None,
    ):
        super().__init__(source, transform)
        self.seed = seed
        self.bad_images = bad_images

    def __getitem__(self, position: int) -> Sample | InputError:
        epoch, place = divmod(position, len(self.source))
        order = epoch_order(self.seed, epoch, len(self.source))
        bad = []
        for attempt in range(len(order)):
            index = int(order[(place + attempt) % len(order)])
            rng = np.random.default_rng([self.seed, position])
            try:
                return *self._read(index, rng), position, bad
            except BadImage as error:
                if error.is_of_drive or self.bad_images is None:
                    return error
                if self.bad_images == "stop":
                    return BadImage(f"{error}; with data.bad_images skip, the next takes its place")
                bad.append((self.source.name(index), str(error)))
        return InputError(f"none of the {len(order)} images of {self.source.spec} can be decoded")
