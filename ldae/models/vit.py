"""Plain ViTs of timm: their shape, their parts and their weights."""

from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import timm
import torch
from timm.layers import DropPath, LayerNorm, Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Attention, Block, LayerScale, VisionTransformer
from torch import nn

from ldae.errors import InputError, unknown
from ldae.models.activations import ACTIVATIONS, name_of

# Classes of the parts of a plain ViT.
_KINDS = {"patch_embed": PatchEmbed, "blocks.0": Block, "blocks.0.attn": Attention,
          "blocks.0.mlp": Mlp}  # fmt: skip


@dataclass(frozen=True)
class ViTShape:
    """The shape of a plain ViT, in timm's words."""

    name: str
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float


@dataclass(frozen=True)
class ViTParts:
    """The parts in which plain ViTs of one shape differ, in timm's words; by default DiT's."""

    class_token: bool = False
    reg_tokens: int = 0
    act_layer: str = "gelu_tanh"
    norm_eps: float = 1e-6
    pre_norm: bool = False
    final_norm: bool = False
    pos_embed: str = "sincos"
    """``sincos`` for constants, or ``learn``."""


def vit_shape(
    name: str,
    depth: int | None = None,
    embed_dim: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
) -> ViTShape:
    """Return the shape of timm's model ``name``, with the given sizes instead of its own.

    Raises: InputError when timm has no such model, when it is not a plain ViT, or when the width is
        not a multiple of the heads and of 4.
    """
    own = _read_named(name)[0]
    given = {"depth": depth, "embed_dim": embed_dim, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
    shape = replace(own, **{size: value for size, value in given.items() if value})
    check_width(shape.embed_dim, shape.num_heads)
    return shape


def norm_eps_of(name: str) -> float:
    """Return the eps of the norms in timm's model ``name``. Raises: InputError as ``vit_shape``."""
    return _read_named(name)[1].norm_eps


@cache
def _read_named(name: str) -> tuple[ViTShape, ViTParts]:
    """Return the shape and the parts of timm's model ``name``.

    Raises: InputError as ``vit_shape``.
    """
    if not timm.is_model(name):
        raise unknown("model.name: timm has no model", name, timm.list_models("vit_*"))
    with torch.device("meta"):  # no memory and no initialisation, for only the shape is needed
        vit = timm.create_model(name, pretrained=False, num_classes=0)
    try:
        return read_vit(vit)
    except InputError as error:
        raise InputError(
            f"model.name: {name} is not one of timm's plain vision transformers: {error}"
        ) from None


def read_vit(vit: nn.Module) -> tuple[ViTShape, ViTParts]:
    """Return the shape and the parts of a model of timm that is a plain ViT.

    Three things are not read: what follows the pooling; LayerScale, which is a factor of weights;
    and the values of the positions, which count as constants here.

    Raises: InputError when the shape and the parts do not describe all other layers of the model;
        the message continues a sentence about the model.
    """
    if type(vit) is not VisionTransformer:
        raise InputError(f"it is a {type(vit).__name__}")
    for name, kind in _KINDS.items():
        if (found := type(vit.get_submodule(name))) is not kind:
            raise InputError(f"its {name} is a {found.__name__}")
    if vit.pos_embed is None:
        raise InputError("it has no table of positions")
    block = vit.blocks[0]
    activation = name_of(block.mlp.act)
    if activation is None:
        raise InputError(
            f"its activation is {type(block.mlp.act).__name__}, not {' or '.join(ACTIVATIONS)}"
        )
    shape = ViTShape(
        name=vit.pretrained_cfg["architecture"],
        patch_size=vit.patch_embed.patch_size[0],
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / vit.embed_dim,
    )
    parts = ViTParts(
        class_token=vit.cls_token is not None,
        reg_tokens=vit.num_reg_tokens,
        act_layer=activation,
        norm_eps=getattr(block.norm1, "eps", 0.0),
        pre_norm=not isinstance(vit.norm_pre, nn.Identity),
        final_norm=not isinstance(vit.norm, nn.Identity),
    )
    _check_layers(vit, shape, parts)
    return shape, parts


def _check_layers(vit: VisionTransformer, shape: ViTShape, parts: ViTParts) -> None:
    """Check that a ViT has the layers of a plain ViT of this shape with these parts.

    Raises: InputError naming the first layer that differs.
    """
    with torch.device("meta"):
        described = VisionTransformer(
            img_size=shape.patch_size,
            patch_size=shape.patch_size,
            in_chans=vit.patch_embed.proj.in_channels,
            num_classes=0,
            norm_layer=partial(LayerNorm, eps=parts.norm_eps),
            **timm_args(shape, parts),
        )
    layers, wanted = _layers(vit), _layers(described)
    for name in sorted(layers.keys() | wanted.keys()):
        if layers.get(name) != wanted.get(name):
            plain = f"not {wanted[name]}" if name in wanted else "which a plain ViT does not have"
            raise InputError(f"its {name} is {layers.get(name, 'missing')}, {plain}")


def timm_args(shape: ViTShape, parts: ViTParts) -> dict[str, Any]:
    """Return the arguments of timm's VisionTransformer for a ViT of this shape and these parts.

    Its features are the mean of the patch tokens. The sizes of images and patches and the positions
    are left out, and so is ``norm_layer``, which timm chooses by the name of a model.
    """
    sizes = asdict(shape)
    del sizes["name"], sizes["patch_size"]
    return sizes | {
        "class_token": parts.class_token,
        "reg_tokens": parts.reg_tokens,
        "no_embed_class": False,
        "global_pool": "avg",
        "init_values": 0.0,  # no LayerScale; None would leave that of timm's model
        "pre_norm": parts.pre_norm,
        "final_norm": parts.final_norm,
        "fc_norm": False,
        "act_layer": parts.act_layer,
    }


def resized_state(vit: VisionTransformer, side: int) -> dict[str, torch.Tensor]:
    """Return the weights of a ViT for ``side`` patches along an edge of the image.

    The positions (1, P + side^2, W) are interpolated as timm does, and begin with those of the P
    prefix tokens, which are 0 if the ViT has none for them.
    """
    state, prefix = vit.state_dict(), vit.num_prefix_tokens
    positions = state["pos_embed"]
    if vit.no_embed_class:
        none = positions.new_zeros(1, prefix, vit.embed_dim)
        positions = torch.cat([none, positions], dim=1)
    old = list(vit.patch_embed.grid_size)
    resized = resample_abs_pos_embed(positions, [side, side], old, num_prefix_tokens=prefix)
    return {**state, "pos_embed": resized}


def _layers(vit: VisionTransformer) -> dict[str, str]:
    """Return the description of each layer that has weights, from the patches to the last norm."""
    no_part = (nn.Identity, nn.Dropout, DropPath, LayerScale)
    return {
        name: repr(layer)
        for name, layer in vit.named_modules()
        if name.startswith(("patch_embed.", "norm", "blocks."))
        and not (any(layer.children()) or isinstance(layer, no_part) or name.endswith(".act"))
    }


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
