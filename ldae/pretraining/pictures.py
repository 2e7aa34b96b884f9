"""The images that the pictures of a run show."""

import torch

from ldae.data.loader import train_batches
from ldae.data.open import open_source
from ldae.data.transforms import CropTransform
from ldae.settings import Config


def samples(config: Config, device: torch.device, count: int = 12) -> torch.Tensor:
    """A few images for the pictures, of the evaluation split where there is one."""
    source = open_source(config.data.source, "eval")
    center = CropTransform(config.data.img_size, config.data.in_chans)
    count = min(count, len(source))
    batches = train_batches(
        source, center, seed=0, start=0, stop=count, batch_size=count, bad_images="skip"
    )
    return next(batches).images.to(device)
