"""timm's augmentation as a pure function of an image and its generator."""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform

from ldae.data.image import to_planes
from ldae.errors import InputError

# timm skips what it does not know, and a misspelt policy would be another one in silence.
_POLICY = re.compile(r"rand(-(m|n|p|mstd|mmax|inc)(\d+(\.\d+)?)|-mstdinf|-t[0-9a-z]+)+")


@contextmanager
def drawn_from(rng: np.random.Generator, device: torch.device | None = None) -> Iterator[None]:
    """Within it the global generators of Python, NumPy and torch, which timm draws from, follow
    ``rng``; after it they are as before. ``device`` is the GPU on which something is drawn, if any.
    """
    python, legacy = random.getstate(), np.random.get_bit_generator()
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        seeds = rng.integers(2**32, size=3).tolist()
        random.seed(seeds[0])
        np.random.set_bit_generator(np.random.PCG64(seeds[1]))
        torch.random.default_generator.manual_seed(seeds[2])
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seeds[2])
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_bit_generator(legacy)


@dataclass(frozen=True)
class Augmentation:
    """timm's training transform: random resized crop, flip, RandAugment, as uint8 (C, H, W).

    Channels that are no RGB are augmented one by one, all by the same draws.

    Raises: InputError for an image that can not have the channels, and by :meth:`check`.
    """

    input_size: tuple[int, int, int]
    """C, H, W."""
    interpolation: str
    mean: tuple[float, ...]
    """Of each channel, in [0, 1]; what a shifted image leaves is filled with it."""
    min_area: float
    """Smallest share of the image that a crop keeps."""
    flip: float
    """Probability of the mirror image."""
    policy: str
    """As timm writes RandAugment's, such as rand-m9-mstd0.5-inc1; empty: none."""

    def check(self) -> None:
        """Raises: InputError for another policy than a RandAugment."""
        if self.policy and not _POLICY.fullmatch(self.policy):
            raise InputError(
                f"augment.policy {self.policy!r} is no RandAugment as timm writes it, such as "
                "rand-m9-mstd0.5-inc1"
            )

    def __call__(self, image: Image.Image | np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        bands = to_planes(image, self.input_size[0])
        if self.input_size[0] not in (1, 3):
            bands = [band for plane in bands for band in plane.split()]
        seed = rng.integers(2**63)
        parts = []
        for transform, band in zip(self._transforms, bands, strict=True):
            with drawn_from(np.random.default_rng(seed)):
                parts.append(transform(band))
        return torch.cat(parts)

    @cached_property
    def _transforms(self) -> list[Callable[[Image.Image], torch.Tensor]]:
        """One of all channels, or one of each."""
        means = [self.mean] if self.input_size[0] == 3 else [(mean,) for mean in self.mean]
        return [self._timm_transform(mean) for mean in means]

    def _timm_transform(self, mean: tuple[float, ...]) -> Callable[[Image.Image], torch.Tensor]:
        composed = create_transform(
            input_size=self.input_size,
            is_training=True,
            scale=(self.min_area, 1.0),
            hflip=self.flip,
            color_jitter=None,
            auto_augment=self.policy or None,
            interpolation=self.interpolation,
            mean=mean,
            normalize=False,
        )
        ops = [op for part in composed.transforms for op in getattr(part, "ops", ())]
        for op in ops:
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize
        return composed


def _posterize(image: Image.Image, bits: int, **unused: object) -> Image.Image:
    """timm's, which at its highest magnitude keeps 0 bits: black, which new Pillows refuse."""
    return auto_augment.posterize(image, bits) if bits else Image.new(image.mode, image.size)
