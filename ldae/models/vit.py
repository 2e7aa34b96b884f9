"""The shape of a ViT, read from its timm name."""

from dataclasses import dataclass

import timm
import torch
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import nn

from ldae.errors import InputError, unknown


@dataclass(frozen=True)
class ViTShape:
    """The shape of a plain ViT, in timm's words."""

    name: str
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float


def vit_shape(
    name: str,
    depth: int | None = None,
    embed_dim: int | None = None,
    num_heads: int | None = None,
) -> ViTShape:
    """Return the shape of timm's model ``name``, with the given sizes instead of its own.

    Raises: InputError when timm has no such model, when it is not a plain ViT, or when the width is
        not a multiple of the heads and of 4.
    """
    if not timm.is_model(name):
        raise unknown("model.name: timm has no model", name, timm.list_models("vit_*"))
    with torch.device("meta"):  # no memory and no initialisation, for only the shape is needed
        vit = timm.create_model(name, pretrained=False, num_classes=0)
    plain = type(vit) is VisionTransformer and vit.num_prefix_tokens < 2
    block = vit.blocks[0] if plain else None
    if type(block) is not Block or isinstance(block.ls1, LayerScale) or block.attn.qkv.bias is None:
        raise InputError(f"model.name: {name} is not one of timm's plain vision transformers")
    shape = ViTShape(
        name=name,
        patch_size=vit.patch_embed.patch_size[0],
        embed_dim=embed_dim or vit.embed_dim,
        depth=depth or len(vit.blocks),
        num_heads=num_heads or block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / vit.embed_dim,
    )
    check_width(shape.embed_dim, shape.num_heads)
    return shape


def check_width(embed_dim: int, num_heads: int, prefix: str = "model.") -> None:
    """Check the width of a stack of blocks. ``prefix`` is that of the settings' names.

    Raises: InputError when it is not a multiple of the heads and of 4.
    """
    if embed_dim % num_heads:
        raise InputError(
            f"{prefix}num_heads {num_heads} does not divide {prefix}embed_dim {embed_dim}"
        )
    if embed_dim % 4:
        raise InputError(
            f"{prefix}embed_dim {embed_dim} is not a multiple of 4 (sine-cosine positions)"
        )


def fuse_attention(network: nn.Module, fused: bool) -> None:
    """Choose whether timm's attention layers call torch's scaled_dot_product_attention.

    They do by default. The choice changes the speed, not the result.
    """
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused  # type: ignore[assignment]  # a plain bool of timm's
