"""The features of a source under a backbone, each image once, at any batch size and world size."""

from typing import Callable, Literal, NamedTuple

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

    The ranks share the work by index. ``precision`` is that of the backbone's arithmetic; in fp32
    no TF32 is used, so that the batch size changes features by less than 1e-5 of their size.

    Raises: InputError when the source has no labels, when the model gives a map and not a vector,
        and when a feature is not finite, naming the image.
    """
    labels = known_labels(source)
    transform = preprocessing(model)
    encode = _encoder(model.to(device).eval(), transform, device, precision)
    features = torch.zeros(len(source), _dim(encode, transform, model))
    own = np.arange(rank(), len(source), world_size())
    batches = eval_batches(source, transform, own, batch_size, workers)
    with progress(len(own), source.spec) as bar:
        for images, _, indices in batches:
            rows = encode(images)
            finite = rows.isfinite().all(1)
            if not finite.all():
                where = source.where(int(indices[~finite][0]))
                raise InputError(f"the features of {where} in {precision} are not finite")
            features[indices] = rows
            bar.update(len(images))
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


def _encoder(
    model: nn.Module, transform: EvalTransform, device: torch.device, precision: Precision
) -> Callable[[torch.Tensor], torch.Tensor]:
    """uint8 (B, C, H, W) -> what the model gives for it, float32 on the CPU."""
    dtype = _AUTOCAST.get(precision)

    @torch.inference_mode()
    def encode(images: torch.Tensor) -> torch.Tensor:
        images = transform.normalise(images.to(device, non_blocking=True))
        no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with no_tf32, torch.autocast(device.type, dtype, enabled=dtype is not None):
            return model(images).float().cpu()

    return encode


def _dim(encode: Callable, transform: EvalTransform, model: nn.Module) -> int:
    shape = encode(torch.zeros(1, *transform.input_size, dtype=torch.uint8)).shape[1:]
    if len(shape) != 1:
        raise InputError(
            f"{model.pretrained_cfg['architecture']} gives a map of shape {tuple(shape)} and not "
            "one vector for an image: it has no global pooling"
        )
    return shape[0]
