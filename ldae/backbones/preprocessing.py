"""The preprocessing of a backbone: timm's evaluation transform, from its ``pretrained_cfg``."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from ldae.data.image import to_planes


@dataclass(frozen=True)
class EvalTransform:
    """timm's evaluation transform for one backbone, split at the 8-bit pixels.

    Called with a decoded image, it returns uint8 (C, H, W). When ``crop_pct`` is 1, an image of the
    input size is copied unchanged. :meth:`normalize` completes the transform on the device.
    """

    input_size: tuple[int, int, int]
    """C, H, W."""
    interpolation: str
    crop_pct: float
    """Side of the crop as a share of the side to which the image is resized first."""
    crop_mode: str
    mean: tuple[float, ...]
    """Mean of each channel, in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each channel, in [0, 1]."""

    def __call__(self, image: Image.Image | np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        planes = to_planes(image, self.input_size[0])
        if len(planes) == 1:
            return self._resize(planes[0])
        # Pillow has no images of so many channels. It resizes each channel by itself in any case.
        parts = [resize(plane) for resize, plane in zip(self._resize_channel, planes, strict=True)]
        return torch.cat(parts)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Convert uint8 images (B, C, H, W) to the float32 input of the backbone, same device."""
        # On a GPU, torch.tensor(..., device=...) would wait for the work that is queued.
        constants = torch.tensor([self.mean, self.std]).to(images.device, non_blocking=True)
        mean, std = constants[..., None, None]
        return images.float().div_(255).sub_(mean).div_(std)

    def transform_tensor(self, images: torch.Tensor) -> torch.Tensor:
        """Resize, crop and normalise square images (B, C, S, S) in [0, 1], differentiably.

        A single channel is repeated as often as the backbone needs.
        """
        chans, side, _ = self.input_size
        resized = math.floor(side / self.crop_pct)  # timm's rule
        if images.shape[-1] != resized:
            mode = "bilinear" if self.interpolation == "bilinear" else "bicubic"
            images = F.interpolate(images, (resized, resized), mode=mode, antialias=True)
        edge = round((resized - side) / 2)
        images = images[..., edge : edge + side, edge : edge + side]
        mean, std = (images.new_tensor(part)[:, None, None] for part in (self.mean, self.std))
        return (images.expand(-1, chans, -1, -1) - mean) / std

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
            mean=mean,  # the colour of the border that crop_mode "border" adds
            normalize=False,
        )


def preprocessing(model: nn.Module) -> EvalTransform:
    """Return the transform that the ``pretrained_cfg`` of a backbone describes."""
    config = resolve_model_data_config(model)
    chans = config["input_size"][0]
    for key in ("mean", "std"):
        values = tuple(config[key])
        config[key] = values * chans if len(values) == 1 else values
    config["input_size"] = tuple(config["input_size"])
    return EvalTransform(**config)
