"""The features of a source under a backbone, each image once, at any batch size and world size."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from ldae.data.loader import eval_batches
from ldae.data.sources import Source
from ldae.distributed import all_reduce_sum, rank, world_size
from ldae.errors import InputError
from ldae.log import progress
from ldae.preprocessing import EvalTransform, preprocessing

Precision = Literal["fp32", "bf16", "fp16"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_ROWS_PER_EXCHANGE = 65_536


class Features(NamedTuple):
    """What a probe learns from, in the order of the source, on the CPU."""

    features: torch.Tensor
    """float32 (N, D)."""
    labels: torch.Tensor
    """int64 (N,)."""
    names: list[str]
    """Stable and unique, so that a split by name is the same on every machine."""


class Encoder:
    """A backbone on a device: uint8 (B, C, H, W) -> float32 features (B, D) on the CPU.

    ``precision`` is that of the backbone's arithmetic; in fp32 no TF32 is used, so that the batch
    size changes features by less than 1e-5 of their size. ``transform`` is the model's own
    preprocessing unless it is given.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: Precision = "fp32",
        transform: EvalTransform | None = None,
    ) -> None:
        self.model, self.device, self.precision = model.to(device).eval(), device, precision
        self.transform = transform or preprocessing(model)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = self.transform.normalise(images.to(self.device, non_blocking=True))
        dtype = _AUTOCAST.get(self.precision)
        no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with no_tf32, torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.model(images).float().cpu()

    def checked(self, images: torch.Tensor, where: Callable[[int], str]) -> torch.Tensor:
        """The features of a batch; ``where`` names the image of a row.

        Raises: InputError when one is not finite, naming the image.
        """
        rows = self(images)
        for row in (~rows.isfinite().all(1)).nonzero()[:1, 0].tolist():
            raise InputError(f"the features of {where(row)} in {self.precision} are not finite")
        return rows

    @cached_property
    def dim(self) -> int:
        """D. Raises: InputError when the model gives a map and not a vector."""
        shape = self(torch.zeros(1, *self.transform.input_size, dtype=torch.uint8)).shape[1:]
        if len(shape) != 1:
            raise InputError(
                f"{self.model.pretrained_cfg['architecture']} gives a map of shape {tuple(shape)} "
                "and not one vector for an image: it has no global pooling"
            )
        return shape[0]

    def share(
        self, source: Source, batch_size: int, workers: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The features of this rank's images of ``source``, by index, and the indices, in batches.

        Raises: InputError as ``checked`` does.
        """
        own = np.arange(rank(), len(source), world_size())
        batches = eval_batches(source, self.transform, own, batch_size, workers)
        with progress(len(own), source.spec) as bar:
            for images, _, indices in batches:
                yield self.checked(images, lambda row: source.where(int(indices[row]))), indices
                bar.update(len(images))


def extract(
    model: nn.Module,
    source: Source,
    *,
    batch_size: int = 256,
    device: torch.device,
    workers: int = 0,
    precision: Precision = "fp32",
) -> Features:
    """The features of every image of ``source``, on every rank; ``model`` moves to ``device``.

    The ranks share the work by index.

    Raises: InputError when the source has no labels, and as ``Encoder`` does.
    """
    labels = known_labels(source)
    encoder = Encoder(model, device, precision)
    features = torch.zeros(len(source), encoder.dim)
    for rows, indices in encoder.share(source, batch_size, workers):
        features[indices] = rows
    # The other ranks' rows are zero here, so the sum is exact. In blocks: the device may be small.
    for block in features.split(_ROWS_PER_EXCHANGE) if world_size() > 1 else ():
        block.copy_(all_reduce_sum(block.to(device)))
    return Features(features, labels, names(source))


def known_labels(source: Source) -> torch.Tensor:
    """The labels of a source, int64 (N,).

    Raises: InputError when it has none.
    """
    if source.labels is None:
        raise InputError(f"{source.spec} ({source.split}) has no labels, which evaluation needs")
    return torch.from_numpy(np.asarray(source.labels, np.int64))


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]
