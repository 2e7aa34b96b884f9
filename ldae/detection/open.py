"""Opens a trained detector for pictures of any size."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ldae.backbones.open import load_backbone
from ldae.backbones.preprocessing import preprocessing
from ldae.data.image import from_pillow
from ldae.detection.jitter import ScaleJitter, canvas_of
from ldae.detection.network import Detector, build_detector
from ldae.devices import device_for
from ldae.errors import InputError
from ldae.precision import float32_products
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import settings_of


class Found(NamedTuple):
    """The instances in a picture, the surest first, on the CPU."""

    boxes: torch.Tensor
    """float32 (N, 4): left, top, right, bottom, in pixels of the picture."""
    classes: list[str]
    """The name of each instance's class."""
    scores: torch.Tensor
    """float32 (N,), in [0, 1]."""
    masks: torch.Tensor | None
    """bool (N, H, W); None for a detector of boxes."""


class TrainedDetector:
    """A detector with its classes and its preprocessing.

    ``network`` is torchvision's Mask R-CNN in eval mode.
    """

    def __init__(self, network: Detector, classes: list[str], transform: ScaleJitter) -> None:
        self.network, self.classes, self._transform = network, classes, transform

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[Found]:
        """Return the instances in each picture, upright by its EXIF; all pictures are one batch.

        Raises: InputError for a picture that cannot be decoded, and for one that cannot have the
            channels of the network.
        """
        if not pictures:
            return []
        pictures = [from_pillow(picture) for picture in pictures]
        rng = np.random.default_rng(0)  # not drawn from without a jitter
        pixels = torch.stack([self._transform(picture, rng) for picture in pictures])
        device = next(self.network.parameters()).device
        sizes = [picture.size for picture in pictures]
        with float32_products():
            found = self.network.find(pixels.to(device).float().div_(255), sizes)
        return [self._named({name: part.cpu() for name, part in each.items()}) for each in found]

    def _named(self, found: dict[str, torch.Tensor]) -> Found:
        classes = [self.classes[number - 1] for number in found["labels"].tolist()]
        masks = found["masks"][:, 0] > 0.5 if "masks" in found else None
        return Found(found["boxes"], classes, found["scores"], masks)


def load_detector(run: str | Path, device: str = "auto") -> TrainedDetector:
    """Open the detector of the newest checkpoint in a run folder of ``ldae.detect``.

    The backbone that the run began with must still be there: its architecture is read from it.

    Args:
        run: the run folder.
        device: auto, cpu, cuda or cuda:N.

    Raises: InputError when the folder holds no detection, or no checkpoint yet, and when the
        backbone that is there now has another architecture.

    Examples:
        >>> detector = ldae.load_detector("runs/detector")
        >>> (found,) = detector([Image.open("street.jpg")])
        >>> list(zip(found.classes, found.boxes.tolist(), found.scores.tolist()))
    """
    run = Path(run).expanduser()
    config = settings_of(run, "detection")
    state = Checkpoints(run).load()
    if state is None:
        raise InputError(f"run folder {run} has no checkpoint yet")
    backbone = load_backbone(config.backbone, random_init=True, in_chans=config.data.in_chans)
    classes, given = state["describe"]["classes"], preprocessing(backbone)
    network = build_detector(backbone, config, len(classes))
    weights = state["average"] or state["model"]
    try:
        network.load_state_dict({name.removeprefix("detector."): w for name, w in weights.items()})
    except RuntimeError:
        raise InputError(
            f"the backbone {config.backbone} is not the one that {run} began with: its "
            "architecture differs"
        ) from None
    network.to(device_for(device)).eval().requires_grad_(False)
    return TrainedDetector(network, classes, canvas_of(given, network.side))
