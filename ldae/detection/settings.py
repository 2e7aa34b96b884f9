"""The settings of a detection. Defaults are ViTDet's for ViT-B."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ldae.downstream.settings import DownstreamConfig, DownstreamDataSettings
from ldae.settings import ExecutionSettings, OptimSettings
from ldae.tree import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Range


@dataclass(frozen=True)
class DetectDataSettings(DownstreamDataSettings):
    """The images and their annotations."""

    source: Annotated[str, tyro.conf.arg(aliases=["--data"], metavar="SOURCE")] = ""
    """A folder in COCO's layout, or digit-scenes[:N[:SEED]]; the network is trained on train."""
    img_size: Annotated[int | None, COUNT, tyro.conf.arg(aliases=["--img-size"])] = None
    """Side of the square input of the network, in pixels; none: 64 patches."""


@dataclass(frozen=True)
class JitterSettings:
    """The augmentation: large-scale jitter."""

    scale: Annotated[tuple[float, float], POSITIVE] = (0.1, 2.0)
    """Smallest and largest long side of an image, as a share of the input's. What is larger than
    the input is cropped at a random place."""
    flip: Annotated[float, SHARE] = 0.5
    """Probability of a horizontal flip."""


@dataclass(frozen=True)
class DetectModelSettings:
    """The backbone in the detector, and the sizes of what is new around it."""

    random_init: Annotated[bool, tyro.conf.arg(aliases=["--random-init"])] = False
    """Take the untrained control: the same architecture with timm's random weights."""
    frozen: Annotated[bool, tyro.conf.arg(aliases=["--frozen"])] = False
    """Keep the backbone as it is, and train only the pyramid and the heads."""
    masks: bool = True
    """Predict masks beside boxes; else segmentations are not read."""
    drop_path: Annotated[float, Range(0, 1, open_high=True)] = 0.1
    """Rate of stochastic depth in the last block; rates rise linearly from 0 in the first block."""
    layer_decay: Annotated[float, Range(0, 1, open_low=True)] = 0.7
    """Learning rate of a block divided by the learning rate of the next block."""
    dim: Annotated[int, COUNT] = 256
    """Channels of the pyramid's maps and of the heads' convolutions."""
    rpn_convs: Annotated[int, COUNT] = 2
    """3x3 convolutions of the region proposal network."""
    box_convs: Annotated[int, NOT_NEGATIVE] = 4
    """3x3 convolutions of the box head, before its hidden layer."""
    box_dim: Annotated[int, COUNT] = 1024
    """Width of the box head's hidden layer."""
    mask_convs: Annotated[int, COUNT] = 4
    """3x3 convolutions of the mask head, before its deconvolution."""
    proposals: Annotated[int, COUNT] = 1000
    """Most proposals of an image that reach the heads."""
    rois: Annotated[int, COUNT] = 512
    """Proposals of an image on which the box head is trained."""


@dataclass(frozen=True)
class DetectSystemSettings(ExecutionSettings):
    """The execution of a detection."""

    eval_every: Annotated[float, NOT_NEGATIVE] = 0
    """Epochs between two evaluations, written to metrics.jsonl; 0: evaluate only at the end."""
    eval_batch: Annotated[int, COUNT] = 8
    """Images of a device in a forward pass of an evaluation."""
    predictions: Annotated[bool, tyro.conf.arg(aliases=["--predictions"])] = False
    """Write the detections in the evaluation images to predictions.json, in COCO's format."""


@dataclass(frozen=True)
class DetectConfig(DownstreamConfig):
    """The configuration of a detection."""

    recipe: tyro.conf.Fixed[str] = "vitdet"
    data: DetectDataSettings = field(default_factory=DetectDataSettings)
    augment: JitterSettings = field(default_factory=JitterSettings)
    model: DetectModelSettings = field(default_factory=DetectModelSettings)
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(
            batch_size=64, blr=4e-4, epochs=100, warmup_epochs=0.14, weight_decay=0.1
        )
    )
    system: DetectSystemSettings = field(default_factory=DetectSystemSettings)
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of the new weights, the data order, the augmentation and the samples of proposals."""
