"""How a backbone wants its images: timm's evaluation transform, by its ``pretrained_cfg``."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from ldae.data.image import to_planes


@dataclass(frozen=True)
class EvalTransform:
    """What a backbone expects: timm's evaluation transform, split at the 8-bit pixels.

    Called on a decoded image it returns uint8 (C, H, W); an image that already has the size is
    copied untouched when ``crop_pct`` is 1. :meth:`normalise` does the rest, on the device.
    """

    input_size: tuple[int, int, int]
    """C, H, W."""
    interpolation: str
    crop_pct: float
    """H over the side to which the image is scaled before the crop."""
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of each channel, in [0, 1]."""

    def __call__(self, image: Image.Image | np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        planes = to_planes(image, self.input_size[0])
        if len(planes) == 1:
            return self._resize(planes[0])
        # Pillow has no images of such channels, but resizes each channel by itself anyway.
        parts = [resize(plane) for resize, plane in zip(self._resize_channel, planes, strict=True)]
        return torch.cat(parts)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) as the float32 that the backbone takes, on the same device."""
        mean = torch.tensor(self.mean, device=images.device)[:, None, None]
        std = torch.tensor(self.std, device=images.device)[:, None, None]
        return images.float().div_(255).sub_(mean).div_(std)

    def adapt(self, pictures: torch.Tensor) -> torch.Tensor:
        """Square pictures (B, C, S, S) in [0, 1] as the backbone takes them, differentiably.

        Grey becomes any number of equal channels.
        """
        chans, side, _ = self.input_size
        scaled = math.floor(side / self.crop_pct)  # timm's rule
        if pictures.shape[-1] != scaled:
            mode = "bilinear" if self.interpolation == "bilinear" else "bicubic"
            pictures = F.interpolate(pictures, (scaled, scaled), mode=mode, antialias=True)
        edge = round((scaled - side) / 2)
        pictures = pictures[..., edge : edge + side, edge : edge + side]
        mean, std = (pictures.new_tensor(part)[:, None, None] for part in (self.mean, self.std))
        return (pictures.expand(-1, chans, -1, -1) - mean) / std

    @cached_property
    def _resize(self) -> Callable[[Image.Image], torch.Tensor]:
        return self._timm_transform(self.mean)

    @cached_property
    def _resize_channel(self) -> list[Callable[[Image.Image], torch.Tensor]]:
        return [self._timm_transform((mean,)) for mean in self.mean]

    def _timm_transform(self, mean: tuple[float, ...]) -> Callable[[Image.Image], torch.Tensor]:
        return create_transform(
            input_size=self.input_size,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            mean=mean,  # the border that crop_mode "border" adds
            normalize=False,
        )


def preprocessing(model: nn.Module) -> EvalTransform:
    """The transform that the ``pretrained_cfg`` of a backbone asks for."""
    config = resolve_model_data_config(model)
    chans = config["input_size"][0]
    for key in ("mean", "std"):
        values = tuple(config[key])
        config[key] = values * chans if len(values) == 1 else values
    config["input_size"] = tuple(config["input_size"])
    return EvalTransform(**config)
