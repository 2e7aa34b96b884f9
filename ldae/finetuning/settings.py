"""The settings of a fine-tuning. Their defaults are MAE's for ViT-B, each with its why beside it."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ldae.settings import ExecutionSettings, OptimSettings
from ldae.tree import COUNT, NOT_NEGATIVE, SHARE, Range

_OPEN_SHARE = Range(0, 1, open_low=True)


@dataclass(frozen=True)
class FinetuneDataSettings:
    """Which images."""

    source: Annotated[str, tyro.conf.arg(aliases=["--data"], metavar="SOURCE")] = ""
    """The labelled images whose train split is learned from."""
    eval_source: Annotated[str, tyro.conf.arg(aliases=["--eval-data"], metavar="SOURCE")] = ""
    """The images to grade on; empty: the evaluation split of the source."""
    img_size: Annotated[int | None, COUNT, tyro.conf.arg(aliases=["--img-size"])] = None
    """Side of the square that the network sees, in pixels; none: the backbone's own."""
    in_chans: Annotated[int, COUNT] = 3
    """Channels of a timm name; the other backbones know their own."""
    bad_images: Literal["stop", "skip"] = "stop"
    """What an undecodable image does: stop the run, or be replaced by the next one and counted."""


@dataclass(frozen=True)
class AugmentSettings:
    """What is done to the images of the train split, and to their labels."""

    min_area: Annotated[float, _OPEN_SHARE] = 0.08  # timm's and torchvision's
    """Smallest share of an image that the random resized crop keeps."""
    flip: Annotated[float, SHARE] = 0.5
    """Probability of the mirror image."""
    policy: str = "rand-m9-mstd0.5-inc1"
    """RandAugment, as timm writes it; empty: none."""
    erasing: Annotated[float, SHARE] = 0.25
    """Probability that a rectangle is replaced by normal noise in every pixel."""
    mixup: Annotated[float, NOT_NEGATIVE] = 0.8
    """Alpha of mixup's Beta distribution; 0: no mixup."""
    cutmix: Annotated[float, NOT_NEGATIVE] = 1.0
    """Alpha of CutMix's Beta distribution; 0: no CutMix."""
    mix_prob: Annotated[float, SHARE] = 1.0
    """Probability that images are mixed at all."""
    switch_prob: Annotated[float, SHARE] = 0.5
    """Probability of CutMix where there are both."""
    mix_images: Annotated[int, COUNT] = 32  # the batch of one device in MAE's run of 32
    """Successive images that share one draw and are mixed with each other, an even number."""
    label_smoothing: Annotated[float, SHARE] = 0.1
    """Share of a label that is spread over all classes."""


@dataclass(frozen=True)
class FinetuneModelSettings:
    """What becomes of the backbone."""

    random_init: bool = False
    """Train the same network from scratch: timm's random initialisation and not the weights."""
    pool: Literal["fc_norm", "own"] = "fc_norm"
    """fc_norm: the mean of the patch tokens, then a LayerNorm, in timm's ViTs; own: as it is. Other
    kinds of networks keep their own in either case."""
    head_std: Annotated[float, NOT_NEGATIVE] = 2e-5
    """Standard deviation of the new classifier's truncated normal weights."""
    drop_path: Annotated[float, Range(0, 1, open_high=True)] = 0.1
    """Probability of stochastic depth in the last block; it rises linearly from 0 in the first."""
    layer_decay: Annotated[float, _OPEN_SHARE] = 0.65
    """Learning rate of a layer over that of the layer after it."""


@dataclass(frozen=True)
class FinetuneSystemSettings(ExecutionSettings):
    """How a fine-tuning is executed."""

    eval_every: Annotated[float, NOT_NEGATIVE] = 1
    """Epochs between two evaluations, which go to metrics.jsonl; 0: only the one at the end."""


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning."""

    backbone: tyro.conf.Fixed[str] = ""
    """What is fine-tuned, see load_backbone."""
    recipe: tyro.conf.Fixed[str] = "mae"
    """The recipe that the settings come from."""
    version: tyro.conf.Fixed[int] = 1
    """Of the recipe: it changes whenever a constant does."""
    size: tyro.conf.Fixed[str] = "B"
    """The ViT whose constants of the recipe are used: B, L or H."""
    data: FinetuneDataSettings = field(default_factory=FinetuneDataSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    model: FinetuneModelSettings = field(default_factory=FinetuneModelSettings)
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(
            batch_size=1024, blr=5e-4, epochs=100, warmup_epochs=5, min_lr=1e-6, weight_decay=0.05
        )
    )
    system: FinetuneSystemSettings = field(default_factory=FinetuneSystemSettings)
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Of the new weights, the data order, the augmentation, the mixing and the drop path."""
