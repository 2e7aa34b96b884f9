"""The fold backwards: a run's encoder that starts from an exported backbone."""

from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ldae.errors import InputError, first_line
from ldae.export import model_args
from ldae.method import LDAE
from ldae.tokenizers import PatchTokenizer


def open_exported(folder: str | Path, method: LDAE) -> VisionTransformer:
    """The backbone in a folder, for the encoder of ``method`` to start from.

    Raises: InputError when the folder holds no backbone of this shape, and for a tokenizer that is a
        network, for whose latents no image model was trained.
    """
    if not isinstance(method.tokenizer, PatchTokenizer):
        raise InputError(
            f"init_from needs a patch-wise tokenizer, not {type(method.tokenizer).__name__}"
        )
    try:
        vit = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # those of json, timm and safetensors have nothing in common
        raise InputError(
            f"init_from {folder} is not an exported backbone: {first_line(error)}"
        ) from None
    with torch.device("meta"):
        wanted = timm.create_model(method.denoiser.shape.name, **model_args(method))
    if _shapes(vit) != _shapes(wanted):
        raise InputError(
            f"init_from {folder} holds a model of another shape than this run's encoder"
        )
    return vit


@torch.no_grad()
def init_from(method: LDAE, vit: VisionTransformer) -> None:
    """Start the encoder of ``method``, whose tokenizer is fitted, from an exported backbone.

    It is the fold backwards: LayerNorms become the bias of adaLN, the same at every t, gates
    become 1, and the patch embedding is taken back through the tokenizer. The decoder stays as it
    is. Positions are fixed, so another image size is fine.
    """
    tokenizer, embed = method.tokenizer, method.denoiser.embed
    weight, bias = vit.patch_embed.proj.weight.flatten(1), vit.patch_embed.proj.bias
    if not method.image_input:
        # patch = inverse(z), which is affine in z: W inverse(z) + b.
        origin = tokenizer.inverse(torch.zeros(1, tokenizer.dim))
        axes = tokenizer.inverse(torch.eye(tokenizer.dim)) - origin
        weight, bias = weight @ axes.T, bias + weight @ origin[0]
    embed.weight.copy_(weight)
    embed.bias.copy_(bias)
    for block, plain in zip(method.denoiser.encoder, vit.blocks, strict=True):
        block.attn.load_state_dict(plain.attn.state_dict())
        block.mlp.load_state_dict(plain.mlp.state_dict())
        ones = torch.ones_like(plain.norm1.bias)
        modulation = (
            plain.norm1.bias, plain.norm1.weight - 1, ones,
            plain.norm2.bias, plain.norm2.weight - 1, ones,
        )  # fmt: skip
        block.adaLN_modulation[1].bias.copy_(torch.cat(modulation))


def _shapes(vit: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the weights; positions are fixed, so their number does not matter."""
    state = vit.state_dict()
    heads = vit.blocks[0].attn.num_heads if isinstance(vit, VisionTransformer) else 0
    shapes = {name: tuple(value.shape) for name, value in state.items() if name != "pos_embed"}
    return shapes | {"heads": (heads,)}
