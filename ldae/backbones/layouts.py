"""The layouts of published checkpoints: how each is recognised, and what timm needs of it.

Names are those of the encoder, after wrappers such as ``module.backbone.`` are removed. DINO's
files, iBOT's backbones and MAE's encoders without decoder hold a plain ViT, which needs no row. In
files of a student and a teacher, the encoder is the teacher's.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ldae.patches import is_sincos

StateDict = dict[str, torch.Tensor]


class Layout(NamedTuple):
    """One layout. A file in it is loaded completely or refused, except for a ``PLAIN`` one."""

    name: str
    """The method, as messages name it."""
    is_in: Callable[[StateDict], bool]
    """Returns whether the named tensors have this layout."""
    dropped: str = ""
    """Pattern of whole names that are no part of the encoder."""
    removed: str = ""
    """Pattern of a part of names that is left out."""
    args: Callable[[StateDict], dict[str, Any]] = lambda weights: {}
    """Returns the arguments with which timm builds the encoder, beside those of its name."""
    refusal: str = ""
    """Why the file is no backbone, after "FILE is "; empty for a backbone."""

    def encoder(self, weights: StateDict) -> StateDict:
        """Return the encoder's part of ``weights``, for timm's own conversion."""
        return {
            re.sub(self.removed, "", name): value
            for name, value in weights.items()
            if not re.fullmatch(self.dropped, name)
        }


def layout_of(weights: StateDict) -> Layout:
    """Return the first of ``LAYOUTS`` in which the named tensors are, or ``PLAIN``."""
    return next((layout for layout in LAYOUTS if layout.is_in(weights)), PLAIN)


def _has(*patterns: str) -> Callable[[StateDict], bool]:
    """Return the test whether every pattern is the whole of some name."""
    return lambda weights: all(any(re.fullmatch(p, name) for name in weights) for p in patterns)


def _is_finetuned_mae(weights: StateDict) -> bool:
    names = ("cls_token", "pos_embed", "blocks.0.attn.qkv.bias", "fc_norm.weight")
    return all(name in weights for name in names) and "norm.weight" not in weights


def _has_positions_of_moco(weights: StateDict) -> bool:
    """Return whether the positions are MoCo v3's constants, which encode the row before the column.

    These are in all of its files: of pre-training, of the linear probe, and converted to DeiT's.
    """
    positions = weights.get("pos_embed")
    if positions is None or positions.ndim != 3 or not positions.numel():
        return False
    class_token, patches = positions[0, 0], positions[0, 1:]
    swapped = patches.roll(patches.shape[1] // 2, 1)
    return is_sincos(swapped) and bool((class_token.abs() <= 1e-3).all())


def _heads_of_moco(weights: StateDict) -> dict[str, Any]:
    """MoCo v3's ViT-S has 12 heads; timm's, as everyone else's, has 6."""
    return {"num_heads": 12} if weights["pos_embed"].shape[-1] == 384 else {}


PLAIN = Layout("", lambda weights: True)
"""Everything else: what fits is loaded, and the rest is listed."""

LAYOUTS = (
    Layout(
        "DiT",
        _has(r"x_embedder\.proj\.weight", r"final_layer\.linear\.weight"),
        refusal="a DiT, which is no timm model: make a run of it by tools/dit_checkpoint.py",
    ),
    Layout(
        "DDAE",
        _has(r"(.*\.)?image_proj\.weight", r"(.*\.)?time_emb\.lin1\.weight"),
        refusal="a U-Net of DDAE, which is neither a timm model nor the U-Net of the row ddpm: it "
        "halves maps with another padding and ends on another group normalisation",
    ),
    Layout("MAE", _has(r"decoder_embed\.weight"), dropped=r"decoder.*|mask_token"),
    Layout("fine-tuned MAE", _is_finetuned_mae, args=lambda weights: {"global_pool": "avg"}),
    Layout("MoCo v3", _has_positions_of_moco, dropped=r"head\.\d+\..*", args=_heads_of_moco),
    # Blocks may be in chunks: block 3 in chunk 0 is blocks.0.3, block 10 in chunk 1 blocks.1.10.
    Layout(
        "DINOv2",
        _has("mask_token", "pos_embed", r"blocks(\.\d+)+\.ls1\.gamma"),
        removed=r"(?<=^blocks\.)\d+\.(?=\d)",
    ),
    Layout("iBOT", _has("masked_embed", "cls_token"), dropped="masked_embed"),
)
"""The layouts that need more than names of timm."""
