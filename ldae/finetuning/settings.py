"""The settings of a fine-tuning. Defaults are MAE's for ViT-B."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ldae.downstream.settings import DownstreamConfig, DownstreamDataSettings
from ldae.settings import ExecutionSettings, OptimSettings
from ldae.tree import COUNT, NOT_NEGATIVE, SHARE, Range

_OPEN_SHARE = Range(0, 1, open_low=True)


@dataclass(frozen=True)
class AugmentSettings:
    """The augmentation of the training images and of their labels."""

    min_area: Annotated[float, _OPEN_SHARE] = 0.08  # timm's and torchvision's
    """Smallest area of the random resized crop, as a share of the image."""
    flip: Annotated[float, SHARE] = 0.5
    """Probability of a horizontal flip."""
    policy: str = "rand-m9-mstd0.5-inc1"
    """RandAugment, in timm's notation; empty: none."""
    erasing: Annotated[float, SHARE] = 0.25
    """Probability of random erasing: a rectangle is replaced by normal noise in every pixel."""
    mixup: Annotated[float, NOT_NEGATIVE] = 0.8
    """Alpha of the Beta distribution of mixup; 0: no mixup."""
    cutmix: Annotated[float, NOT_NEGATIVE] = 1.0
    """Alpha of the Beta distribution of CutMix; 0: no CutMix."""
    mix_prob: Annotated[float, SHARE] = 1.0
    """Probability that images are mixed."""
    switch_prob: Annotated[float, SHARE] = 0.5
    """Probability of CutMix instead of mixup, when both are on."""
    mix_images: Annotated[int, COUNT] = 32  # the batch of one device in MAE's run of 32
    """Consecutive images that are mixed with each other by one random draw; an even number."""
    label_smoothing: Annotated[float, SHARE] = 0.1
    """Probability mass of a label that is spread over all classes."""


@dataclass(frozen=True)
class FinetuneModelSettings:
    """The network that is fine-tuned."""

    random_init: bool = False
    """Train the same network from scratch, from timm's random initialisation."""
    pool: Literal["fc_norm", "own"] = "fc_norm"
    """fc_norm: in timm's ViTs, the mean of the patch tokens, then a LayerNorm; own: the backbone's
    pooling. Other architectures always keep their pooling."""
    head_std: Annotated[float, NOT_NEGATIVE] = 2e-5
    """Standard deviation of the truncated normal weights of the new classifier."""
    drop_path: Annotated[float, Range(0, 1, open_high=True)] = 0.1
    """Rate of stochastic depth in the last block; rates rise linearly from 0 in the first block."""
    layer_decay: Annotated[float, _OPEN_SHARE] = 0.65
    """Learning rate of a layer divided by the learning rate of the next layer."""


@dataclass(frozen=True)
class FinetuneSystemSettings(ExecutionSettings):
    """The execution of a fine-tuning."""

    eval_every: Annotated[float, NOT_NEGATIVE] = 1
    """Epochs between two evaluations, written to metrics.jsonl; 0: evaluate only at the end."""


@dataclass(frozen=True)
class FinetuneConfig(DownstreamConfig):
    """The configuration of a fine-tuning."""

    recipe: tyro.conf.Fixed[str] = "mae"
    version: tyro.conf.Fixed[int] = 2
    data: DownstreamDataSettings = field(default_factory=DownstreamDataSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    model: FinetuneModelSettings = field(default_factory=FinetuneModelSettings)
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(
            batch_size=1024, blr=5e-4, epochs=100, warmup_epochs=5, min_lr=1e-6, weight_decay=0.05
        )
    )
    system: FinetuneSystemSettings = field(default_factory=FinetuneSystemSettings)
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of the new weights, the data order, the augmentation, the mixing and the drop path."""
    license: str = ""
    """License of the classifier's weights, in the hub's spelling, such as cc-by-nc-4.0; empty: its
    config.json and model card claim none."""
