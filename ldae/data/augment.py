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

# timm ignores parts of a policy that it does not know, so a misspelt policy would pass unnoticed.
_POLICY = re.compile(r"rand(-(m|n|p|mstd|mmax|inc)(\d+(\.\d+)?)|-mstdinf|-t[0-9a-z]+)+")


@contextmanager
def seed_global_rng(rng: np.random.Generator, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators, from which timm draws, and restore them at the end.

    ``rng`` gives the seeds of Python's, NumPy's and torch's CPU generator and, if ``device`` is a
    GPU, of that GPU's.
    """
    python_state, numpy_generator = random.getstate(), np.random.get_bit_generator()
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
            random.setstate(python_state)
            np.random.set_bit_generator(numpy_generator)


@dataclass(frozen=True)
class Augmentation:
    """timm's training transform: random resized crop, flip and RandAugment, to uint8 (C, H, W).

    Channels that are not RGB are augmented one by one, all with the same random numbers.

    Raises: InputError for an image that cannot have C channels.
    """

    input_size: tuple[int, int, int]
    """C, H, W."""
    interpolation: str
    mean: tuple[float, ...]
    """Mean of each channel in [0, 1]; it fills the border of shifted and rotated images."""
    min_area: float
    """Smallest share of the image that a crop keeps."""
    flip: float
    """Probability of a horizontal flip."""
    policy: str
    """A RandAugment policy in timm's notation, such as rand-m9-mstd0.5-inc1; empty for none."""

    def check(self) -> None:
        """Check the policy. Raises: InputError when it is not a RandAugment policy."""
        if self.policy and not _POLICY.fullmatch(self.policy):
            raise InputError(
                f"augment.policy {self.policy!r} is not a RandAugment policy in timm's notation, "
                "such as rand-m9-mstd0.5-inc1"
            )

    def __call__(self, image: Image.Image | np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        bands = to_planes(image, self.input_size[0])
        if self.input_size[0] not in (1, 3):
            bands = [band for plane in bands for band in plane.split()]
        seed = rng.integers(2**63)
        parts = []
        for transform, band in zip(self._transforms, bands, strict=True):
            with seed_global_rng(np.random.default_rng(seed)):
                parts.append(transform(band))
        return torch.cat(parts)

    @cached_property
    def _transforms(self) -> list[Callable[[Image.Image], torch.Tensor]]:
        """One transform for grey and RGB images, otherwise one for each channel."""
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
    """Posterize as timm does, but also to 0 bits (black), which newer Pillow versions refuse.

    timm asks for 0 bits at the highest magnitude.
    """
    return auto_augment.posterize(image, bits) if bits else Image.new(image.mode, image.size)
