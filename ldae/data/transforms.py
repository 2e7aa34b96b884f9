"""Crops of decoded images as uint8 tensors."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ldae.data.image import to_planes
from ldae.errors import InputError

Box = tuple[float, float, float, float]  # left, top, right, bottom in source pixels

# Source: torchvision's RandomResizedCrop.
_RATIO = (3 / 4, 4 / 3)  # of width to height
_ATTEMPTS = 10  # draws of a box before the middle is taken


@dataclass(frozen=True)
class CropTransform:
    """A square crop as uint8 (in_chans, img_size, img_size), a pure function of image and ``rng``.

    - ``crop``: ``center`` scales the short side to ``img_size`` and keeps the middle. ``random`` is
      torchvision's RandomResizedCrop with aspect ratios of 3/4 to 4/3. Both resize bicubically with
      antialiasing, in one step from the source pixels, so an image of extreme shape is never
      enlarged as a whole. A crop that already has the size is copied unchanged.
    - ``flip``: mirror left and right with probability 1/2.
    - ``area``: smallest and largest share of the image that a random crop keeps; the default is
      that of MAE's pre-training.
    - ``clip``: clip a box that is too wide or too high to the image, as BYOL does, where
      torchvision draws another box.

    Raises: InputError for an invalid setting or an image that cannot have ``in_chans`` channels.
    """

    img_size: int
    in_chans: int = 3
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    area: tuple[float, float] = (0.2, 1.0)
    clip: bool = False

    def __post_init__(self) -> None:
        if self.crop not in ("center", "random"):
            raise InputError(f"crop must be center or random, not {self.crop!r}")
        if self.img_size < 1 or self.in_chans < 1:
            raise InputError(
                f"img_size and in_chans must be at least 1, not {self.img_size} and {self.in_chans}"
            )

    def __call__(self, image: Image.Image | np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        array = self._cropped(image, rng)
        if self.flip and rng.random() < 0.5:
            array = array[:, ::-1]
        return torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C"))

    def _cropped(self, image: Image.Image | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        size = (self.img_size, self.img_size)
        if self.crop == "center" and getattr(image, "shape", None) == (*size, self.in_chans):
            return image  # of a cache: Pillow would take ten times as long as the copy
        planes = to_planes(image, self.in_chans)
        width, height = planes[0].size
        if self.crop == "center":
            box = _center_box(width, height, self.img_size)
        else:
            box = _random_box(width, height, rng, self.area, self.clip)
        return np.dstack([_crop(plane, box, self.img_size) for plane in planes])


def _crop(plane: Image.Image, box: Box, img_size: int) -> Image.Image:
    left, top, right, bottom = box
    if right - left == bottom - top == img_size and left == int(left) and top == int(top):
        return plane.crop(tuple(map(int, box)))
    # From 6 times the size on, whole blocks are averaged first. The difference is invisible, and
    # large images are many times faster.
    size = (img_size, img_size)
    return plane.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def _center_box(width: int, height: int, img_size: int) -> Box:
    """Return the box that torchvision's Resize and CenterCrop to ``img_size`` keep."""
    short = min(width, height)
    left, right = _center_span(width, width * img_size // short, img_size)
    top, bottom = _center_span(height, height * img_size // short, img_size)
    return left, top, right, bottom


def _center_span(length: int, resized: int, img_size: int) -> tuple[float, float]:
    start = round((resized - img_size) / 2)
    return start * length / resized, (start + img_size) * length / resized


def _random_box(
    width: int, height: int, rng: np.random.Generator, shares: tuple[float, float], clip: bool
) -> Box:
    """Draw a box of random area, ratio and position; return the middle if no box fits."""
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*shares)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if clip:
            w, h = min(max(w, 1), width), min(max(h, 1), height)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return float(left), float(top), float(left + w), float(top + h)
