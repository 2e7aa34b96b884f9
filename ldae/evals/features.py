"""The features of a source under a backbone, each image once, at any batch size and world size."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from ldae.backbones.preprocessing import EvalTransform, preprocessing
from ldae.console import progress
from ldae.data.loader import eval_batches
from ldae.data.source import Source
from ldae.distributed import all_reduce_sum, rank, world_size
from ldae.errors import InputError
from ldae.evals.taps import Reader, Tap, TapReader

# One set of features of 256 x 256 ImageNet is 2 to 5 GB, and a node runs up to eight ranks. Pages of
# a mapped file are the system's to drop, those of memory are not.
IN_MEMORY = 2 * 2**30
"""Bytes of one set of features that are held in memory."""


def new_rows(count: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Room for features (count, dim), zero; in a file from ``IN_MEMORY`` on.

    The file has no name. It lies where ``TMPDIR`` says, and is gone with the tensor or the process.

    Raises: InputError when the disk has no room for it.
    """
    size = dtype.itemsize * count * dim
    if size < IN_MEMORY:
        return torch.zeros(count, dim, dtype=dtype)
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Reserved now: a page of a mapped file that finds the disk full kills the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return torch.from_numpy(
                np.memmap(file, torch.empty(0, dtype=dtype).numpy().dtype, "r+", shape=(count, dim))
            )
    except OSError as error:
        raise InputError(
            f"{folder} has no room for features of {size / 2**30:.1f} GiB ({error.strerror}): "
            "set TMPDIR to a folder of a larger disk"
        ) from None


def rows_on(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``rows`` on the device, if they are few enough to be held there, else where they are."""
    return rows.to(device) if rows.nbytes < IN_MEMORY else rows


Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_ROWS_PER_EXCHANGE = 65_536
_extracted: ContextVar[dict[tuple, torch.Tensor]] = ContextVar("features by what decides them")


class Features(NamedTuple):
    """What a probe learns from, in the order of the source, on the CPU."""

    features: torch.Tensor
    """float32 (N, D): those of all taps, side by side."""
    labels: torch.Tensor
    """int64 (N,)."""
    names: list[str]
    """Stable and unique, so that a split by name is the same on every machine."""
    columns: dict[Tap, slice] = {Tap(): slice(None)}
    """The columns of each tap."""


class Encoder:
    """A backbone on a device: uint8 (B, C, H, W) -> float32 features (B, D) on the CPU.

    ``precision`` is that of the backbone's arithmetic; in fp32 no TF32 is used, so that the batch
    size changes features by less than 1e-5 of their size. ``transform`` is the model's own
    preprocessing unless it is given, and ``reader`` reads the model's own output.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: Precision = "fp32",
        transform: EvalTransform | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.model, self.device, self.precision = model.to(device).eval(), device, precision
        self.transform = transform or preprocessing(model)
        self.reader = reader or TapReader(self.model, (Tap(),))

    def __call__(self, images: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
        """``indices`` (B,) are those of the images in their source, for who draws noise by them."""
        return self.on_device(images, indices).cpu()

    @torch.inference_mode()
    def on_device(self, images: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
        """The features where the backbone is."""
        images = self.transform.normalize(images.to(self.device, non_blocking=True))
        with self._arithmetic():
            parts = self.reader(images, indices)
        return torch.cat([part.float() for part in parts], 1)

    def checked(
        self,
        images: torch.Tensor,
        where: Callable[[int], str],
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The features of a batch; ``where`` names the image of a row.

        Raises: InputError when one is not finite, naming the image.
        """
        rows = self(images, indices)
        for row in (~rows.isfinite().all(1)).nonzero()[:1, 0].tolist():
            raise InputError(f"the features of {where(row)} in {self.precision} are not finite")
        return rows

    @cached_property
    def columns(self) -> dict[Tap, slice]:
        """Of the features of each tap. Raises: InputError when the model gives a map."""
        blank = torch.zeros(1, *self.transform.input_size, dtype=torch.uint8, device=self.device)
        with torch.inference_mode(), self._arithmetic():
            return self.reader.columns(self.transform.normalize(blank))

    @property
    def dim(self) -> int:
        """D. Raises: InputError when the model gives a map and not a vector."""
        return max(span.stop for span in self.columns.values())

    def share(
        self, source: Source, batch_size: int, workers: int, images: np.ndarray | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The features of this rank's images of ``source``, by index, and the indices, in batches.

        ``images`` are the indices that the ranks share, by default all.

        Raises: InputError as ``checked`` does.
        """
        images = np.arange(len(source)) if images is None else images
        own = images[rank() :: world_size()]
        batches = eval_batches(source, self.transform, own, batch_size, workers)
        with progress(len(own), source.spec) as bar:
            for pixels, _, indices in batches:
                rows = self.checked(pixels, lambda row: source.where(int(indices[row])), indices)
                yield rows, indices
                bar.update(len(pixels))

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        dtype = _AUTOCAST.get(self.precision)
        no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with no_tf32, torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            yield


@contextmanager
def extracted_once() -> Iterator[None]:
    """Within it, ``own_rows`` extracts the features of one backbone from a source once.

    For evaluators of it that follow each other: neither its weights nor the images change
    meanwhile, and nobody writes into the features.
    """
    before = _extracted.set({})
    try:
        yield
    finally:
        _extracted.reset(before)


def own_rows(encoder: Encoder, source: Source, batch_size: int = 256, workers: int = 0) -> Features:
    """The features of this rank's share of ``source``: images rank, rank + world size, and so on.

    Raises: InputError when the source has no labels, and as ``Encoder`` does.
    """
    labels = known_labels(source)[rank() :: world_size()]
    own_names = [source.name(i) for i in range(rank(), len(source), world_size())]
    taps = encoder.reader.taps if isinstance(encoder.reader, TapReader) else None
    key = (source.spec, source.split, encoder.transform, encoder.precision, taps)
    extracted = _extracted.get({}) if taps else {}
    if key not in extracted:
        extracted[key] = own_features(encoder, source, batch_size, workers)
    return Features(extracted[key], labels, own_names, encoder.columns)


def own_features(encoder: Encoder, source: Source, batch_size: int, workers: int) -> torch.Tensor:
    """What ``own_rows`` finds of images that need no labels: float32 (N, D)."""
    features = new_rows(len(range(rank(), len(source), world_size())), encoder.dim)
    for rows, indices in encoder.share(source, batch_size, workers):
        features[indices // world_size()] = rows
    return features


def all_rows(own: Features, source: Source, device: torch.device) -> Features:
    """The features of every rank's share, on every rank; ``device`` is where the ranks exchange."""
    if world_size() == 1:
        return own
    features = gather_rows(own.features, len(source), device)
    return Features(features, known_labels(source), names(source), own.columns)


def gather_rows(own: torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
    """What the ranks hold of ``count`` rows, row r of a rank being row r * world size + rank."""
    if world_size() == 1:
        return own
    found = new_rows(count, own.shape[1]) if own.ndim == 2 else own.new_zeros(count)
    # In blocks: the device may be small. The other ranks' rows are zero here: the sum is exact.
    for first in range(0, count, _ROWS_PER_EXCHANGE * world_size()):
        block = found[first : first + _ROWS_PER_EXCHANGE * world_size()]
        mine = own[first // world_size() :][: len(range(rank(), len(block), world_size()))]
        sent = torch.zeros_like(block, device=device)
        sent[rank() :: world_size()] = mine.to(device)
        block.copy_(all_reduce_sum(sent))
    return found


def known_labels(source: Source) -> torch.Tensor:
    """The labels of a source, int64 (N,).

    Raises: InputError when it has none.
    """
    if source.labels is None:
        raise InputError(f"{source.spec} ({source.split}) has no labels, which evaluation needs")
    return torch.from_numpy(np.asarray(source.labels, np.int64))


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]
