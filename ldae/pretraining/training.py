"""What all kinds of pre-training share: the checks before a run, and the training in its folder."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldae import devices, distributed, tree
from ldae.data.loader import Transform
from ldae.data.open import open_source
from ldae.data.source import Source
from ldae.errors import InputError
from ldae.models.vit import fuse_attention
from ldae.pixel_statistics import PixelStatistics
from ldae.precision import float32_products, runs_in_bf16, unchanged_generators
from ldae.pretraining.images import FitImages, pixel_stats
from ldae.pretraining.online_features import watch
from ldae.pretraining.online_knn import online_knn
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.folder import open_run
from ldae.runs.kinds import KINDS
from ldae.runs.skipped import record_skipped
from ldae.settings import SystemSettings
from ldae.train.compilation import fuses_attention
from ldae.train.loop import Hook
from ldae.train.plan import Plan, plan_run
from ldae.train.run import check_warmup, describe_training, train_in, transform_of

_STATISTICS_IMAGES = 20_000  # as many as a row fits its tokenizer on


@dataclass(frozen=True)
class Pretraining:
    """A pre-training in a folder, after the checks that all kinds share."""

    kind: str
    config: Any
    run: Path
    row: str
    """The name of the recipe in the records."""
    device: torch.device
    source: Source
    """The training images."""
    plan: Plan
    bf16: bool
    """Whether the network runs in bfloat16."""
    stats: tuple[tuple[float, ...], tuple[float, ...]]
    """Mean and standard deviation of the pixels; empty to measure them."""

    def hooks(self) -> tuple[Hook, ...]:
        """Return what is measured during the training: the features, and k-NN if it is asked for.

        Raises: InputError as ``online_knn``.
        """
        opening = KINDS[self.kind].functions()
        return (
            *online_knn(self.config, self.plan, self.device, opening.backbone),
            *watch(self.config, self.plan, self.run, self.device, self.source, opening),
        )

    def facts(self, parameters: str, tokens: str) -> dict[str, str]:
        """Return what a dry run prints below the settings, given the sizes of the network."""
        return {
            "parameters": parameters,
            "tokens per image": tokens,
            "images": f"{len(self.source):,} in {self.source.spec}",
        } | describe_training(self.plan, self.config.optim, self.bf16, self.device)

    def open_run(self) -> AbstractContextManager[None]:
        """Open the run folder, see ``ldae.runs.folder.open_run``."""
        return open_run(self.run, self.kind, self.config, self.source, self.device)

    def set_pixel_stats(self, pixels: PixelStatistics) -> None:
        """Set the statistics of the settings, or those of the first images in training order.

        The checkpoint of a run that resumes has them.
        """
        data = self.config.data
        if self.stats[0]:
            pixels.set_pixel_stats(*map(torch.tensor, self.stats))
        elif not Checkpoints(self.run).paths():
            images = FitImages(
                self.source,
                transform_of(self.config),
                _STATISTICS_IMAGES,
                self.config.seed,
                workers=self.config.system.workers,
                bad_images=data.bad_images,
            )
            pixels.fit_pixels(images)
            record_skipped(self.run, images.skipped)

    def train(
        self,
        method: nn.Module,
        hooks: tuple[Hook, ...],
        transform: Transform | None = None,
        learns_labels: bool = False,
    ) -> nn.Module:
        """Train a method to the end of the plan, on crops of the training images.

        Args:
            transform: applied to each image instead of the crop of the settings.
            learns_labels: see ``train_in``.

        Returns: the method, or its moving average where the recipe has one, in evaluation mode.
        """
        method.to(self.device)
        fuse_attention(method, fuses_attention(self.bf16, self.device))
        return train_in(
            self.run,
            method,
            self.config,
            self.config.optim,
            self.plan,
            self.source,
            row=self.row,
            learns_labels=learns_labels,
            transform=transform or transform_of(self.config),
            device=self.device,
            hooks=hooks,
        ).eval()


@contextmanager
def join_ranks(system: SystemSettings) -> Iterator[torch.device]:
    """Join the process group of a pre-training, and yield the device of this rank.

    Inside, products of float32 numbers are computed in float32, but for a training, which has a
    precision of its own. At the end, torch's random generators are as they were before.

    Raises: InputError for a wrong device, and as ``process_group`` does.
    """
    device = devices.device_for(system.device)
    with (
        float32_products(),
        unchanged_generators(),
        distributed.process_group(device, system.rank_timeout),
    ):
        yield device


@contextmanager
def prepare_pretraining(kind: str, config: Any, run: Path, row: str) -> Iterator[Pretraining]:
    """Join the process group, and check what all kinds of pre-training need; nothing is written.

    Raises: InputError for wrong settings or data.
    """
    with join_ranks(config.system) as device:
        tree.check(config)
        check_warmup(run, config.optim)
        if config.data.latents and not hasattr(config, "tokenizer"):
            noun = KINDS[kind].noun
            raise InputError(f"data.latents are of a tokenizer, which {noun} does not have")
        source = open_source(config.data.source, "train")
        plan = plan_run(len(source), config.optim, config.system, device)
        bf16 = runs_in_bf16(config.system.precision, device)
        stats = pixel_stats(config.data)
        yield Pretraining(kind, config, run, row, device, source, plan, bf16, stats)
