"""Large-scale jitter: an image and its instances on the square input of a detector."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldae.backbones.preprocessing import EvalTransform
from ldae.data.image import to_planes
from ldae.data.instances import Instances
from ldae.data.workers import Batch


@dataclass(frozen=True)
class ScaleJitter:
    """Images, uint8 (C, S, S), at a random scale in the upper left corner, with their instances.

    At a scale of 1 the long side is S. What is larger than the input is cropped at a random place,
    and the rest of the input is ``fill``. With ``scale`` (1, 1) and no ``flip``, it is the
    preprocessing of evaluation.

    An instance keeps the part of its box that lies inside of the crop. One of less than a pixel is
    left out. The target is a dict of arrays: ``boxes``, float32 (N, 4), left, top, right, bottom;
    ``labels``, int64 (N,); and ``masks``, if there are any, uint8 (N, S, S / 8), eight pixels of a
    row in a byte.

    Source: Ghiasi et al. 2021, Simple copy-paste, section 3; Li et al. 2022.

    Raises: InputError for an image that cannot have C channels.
    """

    input_size: tuple[int, int, int]
    """C, S, S."""
    fill: tuple[int, ...]
    """The value of each channel where there is no image."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest long side, as a share of S."""
    flip: float = 0.0
    """Probability of a horizontal flip."""

    def __call__(self, image: Image.Image | np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return self.joint(image, None, rng)[0]

    def joint(
        self, image: Image.Image | np.ndarray, target: Any, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Any]:
        """Return the input of the detector, and its target where the image has ``Instances``."""
        channels, side, _ = self.input_size
        planes = to_planes(image, channels)
        width, height = planes[0].size
        w, h = fitted_size((width, height), side, rng.uniform(*self.scale))
        left, top = (int(rng.integers(max(length - side, 0) + 1)) for length in (w, h))
        right, bottom = min(left + side, w), min(top + side, h)
        mirrored = rng.random() < self.flip
        canvas = np.empty((side, side, channels), np.uint8)
        canvas[:] = self.fill
        box = (left * width / w, top * height / h, right * width / w, bottom * height / h)
        size = (right - left, bottom - top)
        resized = [plane.resize(size, Image.Resampling.BILINEAR, box=box) for plane in planes]
        canvas[: size[1], : size[0]] = np.dstack([np.asarray(part) for part in resized])
        if mirrored:
            canvas = canvas[:, ::-1]
        pixels = torch.from_numpy(np.array(canvas.transpose(2, 0, 1), order="C"))
        if not isinstance(target, Instances):
            return pixels, target
        return pixels, _moved(target, (w, h), (left, top, right, bottom), side, mirrored)


def canvas_of(
    given: EvalTransform, side: int, scale: tuple[float, float] = (1.0, 1.0), flip: float = 0.0
) -> ScaleJitter:
    """Return the preprocessing of a detector with the pixel statistics of its backbone's."""
    fill = tuple(round(255 * mean) for mean in given.mean)
    return ScaleJitter((given.input_size[0], side, side), fill, scale, flip)


def fitted_size(size: tuple[int, int], side: int, scale: float = 1.0) -> tuple[int, int]:
    """Return width and height of an image whose long side becomes ``scale * side`` pixels."""
    ratio = scale * side / max(size)
    return max(round(size[0] * ratio), 1), max(round(size[1] * ratio), 1)


def _moved(
    found: Instances,
    size: tuple[int, int],
    crop: tuple[int, int, int, int],
    side: int,
    mirrored: bool,
) -> dict[str, np.ndarray]:
    """Return instances after a resize to ``size``, a crop and a flip."""
    (width, height), (w, h), (left, top, right, bottom) = found.size, size, crop
    boxes = found.boxes * np.float32([w / width, h / height] * 2) - np.float32([left, top] * 2)
    boxes = boxes.clip(0, np.float32([right - left, bottom - top] * 2))
    shown = None
    if found.masks is not None:
        rows = ((np.arange(top, bottom) + 0.5) * height / h).astype(np.int64)
        columns = ((np.arange(left, right) + 0.5) * width / w).astype(np.int64)
        shown = found.masks[:, rows[:, None], columns]
        if (right - left, bottom - top) != (w, h):  # what a crop leaves may be smaller than its box
            boxes = _boxes_of(shown)
    kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    boxes = boxes[kept]
    if mirrored:
        boxes[:, [0, 2]] = side - boxes[:, [2, 0]]
    target = {"boxes": boxes, "labels": found.labels[kept]}
    if shown is not None:
        masks = np.zeros((int(kept.sum()), side, side), bool)
        masks[:, : shown.shape[1], : shown.shape[2]] = shown[kept]
        target["masks"] = np.packbits(masks[:, :, ::-1] if mirrored else masks, axis=2)
    return target


def _boxes_of(masks: np.ndarray) -> np.ndarray:
    """Return the smallest boxes, float32 (N, 4), around masks (N, H, W); of an empty one zeros."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks):
        rows, columns = (mask.any(axis).nonzero()[0] for axis in (1, 0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


@dataclass(frozen=True)
class OnDevice:
    """Moves a batch of ``ScaleJitter`` to a device, in the form that torchvision's detectors take.

    Images become float32 in [0, 1]. Labels count from 1, since 0 is the background, and masks are
    uint8 (N, S, S).
    """

    device: torch.device

    def __call__(self, batch: Batch) -> Batch:
        images = batch.images.to(self.device, non_blocking=True).float().div_(255)
        targets = [
            {name: torch.from_numpy(part).to(self.device) for name, part in target.items()}
            for target in batch.targets
        ]
        for target in targets:
            target["labels"] = target["labels"] + 1
            if "masks" in target:
                target["masks"] = _unpacked(target["masks"], images.shape[-1])
        return batch._replace(images=images, targets=targets)


def _unpacked(packed: torch.Tensor, side: int) -> torch.Tensor:
    """Convert uint8 (N, S, S / 8) to one byte for each pixel, uint8 (N, S, S)."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> places & 1).flatten(2)[..., :side]
