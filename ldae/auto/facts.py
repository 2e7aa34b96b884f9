"""The facts for the rule of the scale auto: a sample of the images, and steps of training."""

import os
import time
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ldae.auto.rule import Machine
from ldae.data.loader import Transform, train_batches
from ldae.data.source import Source
from ldae.data.workers import available_cpus
from ldae.machine import hardware
from ldae.machine.timing import fitting_step, kept_bytes
from ldae.models.vit import vit_shape
from ldae.tokenizers.orthonormal import PatchPCA
from ldae.train.memory import release_memory
from ldae.train.run import transform_of
from ldae.train.update import on_device

_SAMPLE = 256  # images
_AT_ONCE = 16
_SECONDS = 10.0  # after which no further image of the sample is read
_STEP_SECONDS = 3.0  # after which no further step of a network begins
_STEP_IMAGES = {"cpu": 32, "cuda": 512}


class Speed(NamedTuple):
    """The speed and the memory of a training step on one rank."""

    images_per_second: float
    bytes_an_image: int
    """Bytes that the forward pass keeps of an image for the backward pass; 0 for a compiled
    network, where they are not measured."""
    batch_size: int


def median_side(source: Source, config: Any) -> int:
    """Return the median of the short sides of the images, in pixels.

    Raises: BadImage for an image that cannot be decoded, unless data.bad_images is skip.
    """
    sides, _ = _sample(source, _short_side, config)
    return int(sides.median())


def _short_side(image: Image.Image | np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    return torch.tensor([min(image.shape[:2] if isinstance(image, np.ndarray) else image.size)])


def decode_seconds(source: Source, config: Any) -> float:
    """Return the seconds in which one core decodes and crops an image. Raises: BadImage.

    Where there are enough images, they are other ones than those of ``median_side``, which the
    memory of the system holds: a drive may be much slower.
    """
    first = _SAMPLE if len(source) >= 2 * _SAMPLE else 0
    return _sample(source, transform_of(config), config, first)[1]


def patch_variances(source: Source, config: Any) -> list[float]:
    """Return the variance of patches on each of their principal axes, in falling order."""
    crops, _ = _sample(source, transform_of(config), config)
    data = config.data
    tokenizer = PatchPCA(data.img_size, config.model.patch_size, data.in_chans, 1, "raw")
    tokenizer.fit([crops])
    return tokenizer.variances.tolist()


def _sample(
    source: Source, transform: Transform, config: Any, first: int = 0
) -> tuple[torch.Tensor, float]:
    """Return images from position ``first`` of the training order on, and the seconds for each."""
    batches = train_batches(
        source,
        transform,
        seed=config.seed,
        start=first,
        stop=min(first + _SAMPLE, len(source)),
        batch_size=_AT_ONCE,
        bad_images=config.data.bad_images,
    )
    found, begun = [], time.perf_counter()
    with closing(batches):
        for batch in batches:
            found.append(batch.images)
            if time.perf_counter() - begun > _SECONDS:
                break
    seconds = time.perf_counter() - begun
    images = torch.cat(found)
    return images, seconds / len(images)


def machine_of_rank(device: torch.device) -> Machine:
    """Return the part of this machine that one of the launched ranks has for itself."""
    ranks_here, gpu = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), device.type == "cuda"
    found = hardware.describe_machine(device)
    return Machine(
        gpu=gpu,
        cores=max(available_cpus() // ranks_here, 1),
        memory=found["memory"] if gpu else found["memory"] // ranks_here,
        ranks=int(os.environ.get("WORLD_SIZE", 1)),
        busy=found["busy"] if ranks_here == 1 else 0.0,
    )


def parameters_of(config: Any) -> int:
    """Return the weights in the blocks of the encoder and the decoder, without biases.

    Raises: InputError when the sizes of the encoder do not fit together.
    """
    model = config.model
    ratio = getattr(model, "mlp_ratio", None)
    shape = vit_shape(model.name, model.depth, model.embed_dim, model.num_heads, ratio)
    depth, width = (getattr(model, f"decoder_{size}", 0) for size in ("depth", "embed_dim"))
    depth = shape.depth if depth is None else depth  # None: as large as the encoder
    width = shape.embed_dim if width is None else width
    # Four matrices of attention, and two of the MLP.
    area = shape.depth * shape.embed_dim**2 + depth * width**2
    return round((4 + 2 * shape.mlp_ratio) * area)


def measure_step(config: Any, device: torch.device, batch_size: int = 0) -> Speed:
    """Return the speed of training steps on random images.

    Args:
        batch_size: images in a step, halved until they fit; by default enough for a full device.

    Raises: InputError when one image does not fit into the memory of the device.
    """
    step = fitting_step(config, device, batch_size or _STEP_IMAGES[device.type])
    rate = step.rate(at_most=_STEP_SECONDS)
    kept = 0 if step.state.compiled else kept_bytes(step.method, *on_device(step.batch, device))
    speed = Speed(rate, kept // step.batch_size, step.batch_size)
    compiled = step.state.compiled
    del step
    release_memory(device, compiled)
    return speed
