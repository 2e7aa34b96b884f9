"""Extract features of a source, each image once, at any batch size and world size."""

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
from ldae.devices import report_low_memory
from ldae.distributed import all_reduce_sum, rank, share_of, world_size
from ldae.errors import InputError
from ldae.evals.taps import Reader, Tap, TapReader
from ldae.precision import float32_products

Precision = Literal["fp32", "bf16", "fp16"]

# Features of ImageNet at 256 x 256 take 2 to 5 GB, and a node runs up to eight ranks. The system
# can drop pages of a mapped file, but not pages of memory.
MAX_BYTES_IN_MEMORY = 2 * 2**30
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_ROWS_PER_EXCHANGE = 65_536
_cache: ContextVar[dict[tuple, torch.Tensor]] = ContextVar("features by all that decides them")


def allocate_rows(count: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return zeros (count, dim); from ``MAX_BYTES_IN_MEMORY`` on they are mapped from a file.

    The file has no name. It lies below ``TMPDIR`` and is gone with the tensor or the process.

    Raises: InputError when the disk has no room for it.
    """
    size = dtype.itemsize * count * dim
    if size < MAX_BYTES_IN_MEMORY:
        return torch.zeros(count, dim, dtype=dtype)
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Reserve the blocks now: writing to a mapped page on a full disk kills the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
            return torch.from_numpy(np.memmap(file, numpy_dtype, "r+", shape=(count, dim)))
    except OSError as error:
        raise InputError(
            f"{folder} has no room for features of {size / 2**30:.1f} GiB ({error.strerror}): "
            "set TMPDIR to a folder of a larger disk"
        ) from None


def move_if_fits(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move ``rows`` to a GPU if they take less than half of its free memory."""
    if device.type == "cuda" and rows.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        return rows.to(device)
    return rows


class Features(NamedTuple):
    """Features and labels of images, in the order of the source, on the CPU."""

    features: torch.Tensor
    """float32 (N, D): the features of all taps, side by side."""
    labels: torch.Tensor
    """int64 (N,)."""
    columns: dict[Tap, slice] = {Tap(): slice(None)}
    """The columns of each tap."""


class Encoder:
    """A backbone on a device: uint8 (B, C, H, W) -> float32 features (B, D) on the CPU.

    In fp32 no TF32 is used, so that the batch size changes features by less than 1e-5 relative.

    Args:
        precision: of the backbone's arithmetic.
        transform: by default the model's own preprocessing.
        reader: by default reads the model's own output.
        batch_size: images per forward pass.
        workers: processes that decode images.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: Precision = "fp32",
        transform: EvalTransform | None = None,
        reader: Reader | None = None,
        batch_size: int = 256,
        workers: int = 0,
    ) -> None:
        self.model, self.device, self.precision = model.to(device).eval(), device, precision
        self.batch_size, self.workers = batch_size, workers
        self.transform = transform or preprocessing(model)
        self.reader = reader or TapReader(self.model, (Tap(),))

    def __call__(self, images: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
        """Return features; a reader that adds noise draws it by ``indices`` (B,) in the source."""
        return self.on_device(images, indices).cpu()

    @torch.inference_mode()
    def on_device(self, images: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
        """Return features on the device of the backbone.

        Raises: InputError when the device has too little memory.
        """
        with report_low_memory(self.device, f"{len(images)} images", "--batch-size"):
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
        """Return the features (B, D) of a batch, float32.

        Raises: InputError when a row is not finite, naming its image as ``where`` does.
        """
        rows = self(images, indices)
        broken = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            raise InputError(
                f"the features of {where(broken[0])} in {self.precision} are not finite"
            )
        return rows

    @cached_property
    def columns(self) -> dict[Tap, slice]:
        """The columns of each tap. Raises: InputError when the model outputs a map."""
        blank = torch.zeros(1, *self.transform.input_size, dtype=torch.uint8, device=self.device)
        with torch.inference_mode(), self._arithmetic():
            return self.reader.columns(self.transform.normalize(blank))

    @property
    def dim(self) -> int:
        """D. Raises: InputError when the model outputs a map."""
        return max(span.stop for span in self.columns.values())

    def share(
        self, source: Source, images: np.ndarray | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this rank's share of the features of ``source`` and their indices, in batches.

        ``images`` are the indices that the ranks share, by default all.

        Raises: InputError as ``checked`` does.
        """
        images = np.arange(len(source)) if images is None else images
        share = images[rank() :: world_size()]
        batches = eval_batches(source, self.transform, share, self.batch_size, self.workers)
        with progress(len(share), source.spec) as bar:
            for pixels, _, indices in batches:
                rows = self.checked(pixels, lambda row: source.where(int(indices[row])), indices)
                yield rows, indices
                bar.update(len(pixels))

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        dtype = _AUTOCAST.get(self.precision)
        autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        with float32_products(), autocast:
            yield


@contextmanager
def cache_features() -> Iterator[None]:
    """Let ``extract_share`` compute the features of a source under one backbone once.

    It is for graders of one backbone in a row: the weights and the images must not change within,
    and features must not be written to.
    """
    before = _cache.set({})
    try:
        yield
    finally:
        _cache.reset(before)


def extract_share(encoder: Encoder, source: Source) -> Features:
    """Return the features of this rank's share of ``source``: images rank, rank + world size, ...

    Raises: InputError when the source has no labels, and as ``Encoder`` does.
    """
    labels = known_labels(source)[rank() :: world_size()]
    taps = encoder.reader.taps if isinstance(encoder.reader, TapReader) else None
    key = (source.spec, source.split, encoder.transform, encoder.precision, taps)
    cache = _cache.get({}) if taps else {}
    if key not in cache:
        cache[key] = encode_share(encoder, source)
    return Features(cache[key], labels, encoder.columns)


def encode_share(encoder: Encoder, source: Source) -> torch.Tensor:
    """Return this rank's share of the features, float32 (N, D); the source needs no labels."""
    features = allocate_rows(len(share_of(len(source))), encoder.dim)
    for rows, indices in encoder.share(source):
        features[indices // world_size()] = rows
    return features


def gather_rows(share: torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
    """Join ``count`` rows of all ranks, where row r of a rank is row r * world size + rank."""
    if world_size() == 1:
        return share
    is_vector = share.ndim == 1
    joined = (
        share.new_zeros(count) if is_vector else allocate_rows(count, share.shape[1], share.dtype)
    )
    # In blocks, because the device may be small. A sum with the other ranks' zeros is exact.
    for first in range(0, count, _ROWS_PER_EXCHANGE * world_size()):
        block = joined[first : first + _ROWS_PER_EXCHANGE * world_size()]
        rows = share[first // world_size() :][: len(share_of(len(block)))]
        sent = torch.zeros_like(block, device=device)
        sent[rank() :: world_size()] = rows.to(device)
        block.copy_(all_reduce_sum(sent))
    return joined


def known_labels(source: Source) -> torch.Tensor:
    """Return the labels of a source, int64 (N,).

    Raises: InputError when the source has none.
    """
    if source.labels is None:
        why = source.unlabelled and f": {source.unlabelled}"
        raise InputError(
            f"{source.spec} ({source.split}) has no labels, which evaluation needs{why}"
        )
    return torch.from_numpy(np.asarray(source.labels, np.int64))


def image_names(source: Source) -> list[str]:
    """Return names by which images are split, in the same way on every machine."""
    return [source.name(i) for i in range(len(source))]
