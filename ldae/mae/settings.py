"""The configuration of an MAE pre-training. The defaults are MAE's published pre-training."""

from dataclasses import dataclass, field
from typing import Annotated

from ldae.settings import DataSettings, OptimSettings, SystemSettings
from ldae.tree import COUNT, NOT_NEGATIVE, Range


@dataclass(frozen=True)
class MAEModelSettings:
    """The sizes of the encoder, a ViT, and of the narrow decoder."""

    name: str = "vit_large_patch16_224"
    """A timm ViT, which gives patch_size, depth, embed_dim and num_heads unless they are set."""
    patch_size: Annotated[int | None, COUNT] = None
    """Side of a patch, in pixels."""
    depth: Annotated[int | None, COUNT] = None
    """Blocks of the encoder."""
    embed_dim: Annotated[int | None, COUNT] = None
    """Width of the encoder."""
    num_heads: Annotated[int | None, COUNT] = None
    """Attention heads of the encoder."""
    decoder_depth: Annotated[int, COUNT] = 8
    """Blocks of the decoder."""
    decoder_embed_dim: Annotated[int, COUNT] = 512
    """Width of the decoder."""
    decoder_num_heads: Annotated[int, COUNT] = 16
    """Attention heads of the decoder."""


@dataclass(frozen=True)
class MAEObjectiveSettings:
    """The masking of the input, and the target."""

    mask_ratio: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.75
    """Share of the patches that are masked: the encoder does not see them, the loss does."""
    norm_pix_loss: bool = True  # PRETRAIN.md: "for better representation learning"
    """Predict the pixels of a patch less their mean, divided by their standard deviation."""


@dataclass(frozen=True)
class MAEConfig:
    """The settings of an MAE pre-training."""

    data: DataSettings = field(
        default_factory=lambda: DataSettings(
            img_size=224, crop="random", flip=True, stats="imagenet"
        )
    )
    model: MAEModelSettings = field(default_factory=MAEModelSettings)
    objective: MAEObjectiveSettings = field(default_factory=MAEObjectiveSettings)
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(
            batch_size=4096,
            blr=1.5e-4,
            epochs=800,  # PRETRAIN.md's; 1600 give the paper's final numbers
            warmup_epochs=40,
            weight_decay=0.05,
            betas=(0.9, 0.95),
        )
    )
    system: SystemSettings = field(default_factory=SystemSettings)
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of the weights, the data order, the augmentation and the masks."""
    init_from: str = ""
    """An MAE to go on from: a run, an exported folder, or NAME@FILE for a published checkpoint.
    Its pixel statistics are used; its decoder too, if there is one."""
