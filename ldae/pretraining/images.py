"""The images that are read beside the training: for statistics, for a fit and for pictures."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ldae import console, distributed
from ldae.data.loader import train_batches
from ldae.data.open import open_source, source_splits
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.errors import InputError
from ldae.settings import DataSettings

FIT_BATCH = 256


@dataclass(frozen=True)
class FitImages:
    """This rank's share of about ``count`` images, in a random order that is the same in each pass.

    Iteration yields uint8 batches (B, C, H, W). Only full batches are used.
    """

    source: Source
    transform: CropTransform
    count: int
    """Number of images, over all ranks."""
    seed: int
    at_once: int = FIT_BATCH
    """Largest number of images in a batch of one rank."""
    workers: int = 0
    """Data workers of each rank."""
    bad_images: Literal["stop", "skip"] = "stop"
    """Stop at an image that cannot be decoded, or skip it, as in ``train_batches``."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Gets the images that this rank could not decode and skipped: name -> reason."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        world = distributed.world_size()
        count = min(self.count, len(self.source))
        batch_size = min(self.at_once, max(1, count // world)) * world
        stop = max(batch_size, count // batch_size * batch_size)
        batches = train_batches(
            self.source,
            self.transform,
            seed=self.seed,
            start=0,
            stop=stop,
            batch_size=batch_size,
            rank=distributed.rank(),
            world_size=world,
            workers=self.workers,
            bad_images=self.bad_images,
        )
        with console.progress(stop, "statistics") as bar:
            for batch in batches:
                self.skipped.update(batch.bad)
                yield batch.images
                bar.update(batch_size)


def pixel_stats(data: DataSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation that the settings give; empty to measure them.

    Raises: InputError for another number of values than channels.
    """
    mean, std, chans = data.mean, data.std, data.in_chans
    if not mean and not std and data.stats == "imagenet":
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if mean or std:
        for name, values in (("data.mean", mean), ("data.std", std)):
            if len(values) != chans:
                raise InputError(
                    f"{name} needs one number for each of {chans} channels, not {values}"
                )
    return mean, std


def evaluation_images(data: DataSettings) -> Source:
    """Open the evaluation images of a pre-training, or the training images if there are no others.

    Raises: InputError as ``open_source``.
    """
    spec = data.eval_source or data.source
    return open_source(spec, "train" if [*source_splits(spec)] == ["train"] else "eval")


def sample_images(data: DataSettings, device: torch.device, count: int = 12) -> torch.Tensor:
    """Return images for a run's pictures, uint8 (n, C, H, W), of the evaluation images if any.

    Images that cannot be decoded are left out, because pictures measure nothing.
    """
    source = evaluation_images(data)
    center = CropTransform(data.img_size, data.in_chans)
    count = min(count, len(source))
    batches = train_batches(
        source, center, seed=0, start=0, stop=count, batch_size=count, bad_images="skip"
    )
    return next(batches).images.to(device)
