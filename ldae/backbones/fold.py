"""Fold an encoder into a stock timm VisionTransformer, and the way back."""

import copy
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ldae import tokenizers
from ldae.errors import InputError, first_line
from ldae.method import LDAE
from ldae.models.dit import Block
from ldae.tokenizers import PatchTokenizer

TIMESTEP = 10  # of 1000, the best of the paper's appendix with clean input
TOLERANCE = 1e-5  # relative, in float32


@torch.no_grad()
def fold(method: LDAE, timestep: int = TIMESTEP) -> VisionTransformer:
    """The encoder half at a fixed t and with clean input, as a VisionTransformer in eval mode.

    It takes images normalised by the tokenizer's pixel statistics, (B, C, H, W), and gives averaged
    features (B, W). Everything between the pixels and the first block is affine in a patch
    (projection, latent scale, gamma_t, inverse projection, embedding), so it becomes the one
    convolution of the patch embedding. At a fixed t, adaLN's shift and scale are a LayerNorm's bias
    and weight, and its gates scale the rows of the two projections that end on the residual.

    Rows of a single noise level have a single t; class-conditional rows get the null label.

    Raises: InputError when the tokenizer is a network, and when folded and unfolded features differ
        by more than 1e-5.
    """
    if not isinstance(method.tokenizer, PatchTokenizer):
        raise InputError(
            f"tokenizer.name {tokenizers.name_of(method.tokenizer)} is a network, which can not be "
            "folded into a timm ViT: ldae knn and linear grade the run itself"
        )
    t = min(timestep, len(method.sigma) - 1)
    exact = copy.deepcopy(method).cpu().double().eval()
    exact.bf16 = False
    condition = exact.denoiser.condition(torch.tensor([t]))
    state = {"pos_embed": exact.denoiser.pos_embed[None]} | _fold_embedding(exact, t)
    for number, block in enumerate(exact.denoiser.encoder):
        folded = _fold_block(block, condition)
        state |= {f"blocks.{number}.{name}": value for name, value in folded.items()}
    vit = timm.create_model(
        method.denoiser.shape.name,
        pretrained=False,
        pretrained_cfg=pretrained_cfg(method),
        **model_args(method),
    )
    vit.load_state_dict({name: value.float() for name, value in state.items()})
    vit.eval()
    vit.model_args = model_args(method)
    _verify(exact, vit, t)
    return vit


def _fold_embedding(method: LDAE, t: int) -> dict[str, torch.Tensor]:
    """The path from a normalised patch to the embedded token, read off its values at 0 and at I."""
    tokenizer, denoiser = method.tokenizer, method.denoiser

    def embed(patches: torch.Tensor) -> torch.Tensor:
        z = method.gamma[t] * tokenizer.project(patches)
        return denoiser.embed(tokenizer.inverse(z) if method.image_input else z)

    unit = torch.eye(tokenizer.patch_dim, dtype=method.gamma.dtype)
    bias = embed(torch.zeros_like(unit[:1]))[0]
    weight = (embed(unit) - bias).T
    shape = (-1, tokenizer.in_chans, tokenizer.patch_size, tokenizer.patch_size)
    return {"patch_embed.proj.weight": weight.reshape(shape), "patch_embed.proj.bias": bias}


def _fold_block(block: Block, condition: torch.Tensor) -> dict[str, torch.Tensor]:
    """An adaLN-Zero block at a fixed condition (1, cond_dim) as the weights of a plain ViT block."""
    modulation = block.adaLN_modulation(condition)[0]
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6)
    folded = {f"attn.{name}": value for name, value in block.attn.state_dict().items()}
    folded |= {f"mlp.{name}": value for name, value in block.mlp.state_dict().items()}
    folded |= {"norm1.weight": 1 + scale1, "norm1.bias": shift1}
    folded |= {"norm2.weight": 1 + scale2, "norm2.bias": shift2}
    for name, gate in (("attn.proj", gate1), ("mlp.fc2", gate2)):
        folded[f"{name}.weight"] = gate[:, None] * folded[f"{name}.weight"]
        folded[f"{name}.bias"] = gate * folded[f"{name}.bias"]
    return folded


@torch.no_grad()
def features(method: LDAE, images: torch.Tensor, t: int) -> torch.Tensor:
    """What the unfolded encoder gives for clean normalised images (B, C, H, W): (B, W)."""
    return method.denoiser.encode(*input_at(method, images, t)).mean(1)


def input_at(
    method: LDAE, images: torch.Tensor, t: int, eps: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the denoiser sees of normalised images at ``t``: tokens (B, N, in_dim) and condition.

    Without ``eps`` (B, N, d) the input is clean: what the network saw at that t, less the noise.
    """
    z = method.gamma[t] * method.encode(images)
    if eps is not None:
        z = z + method.sigma[t] * eps
    steps = torch.full((len(images),), t, device=images.device)
    tokens = method.tokenizer.inverse(z) if method.image_input else z
    return tokens, method.denoiser.condition(steps)


def _verify(exact: LDAE, vit: VisionTransformer, t: int) -> None:
    tokenizer = exact.tokenizer
    generator = torch.Generator().manual_seed(0)
    size = (4, tokenizer.in_chans, tokenizer.img_size, tokenizer.img_size)
    images = torch.randn(size, generator=generator)
    wanted = features(exact, images.double(), t)
    error = (vit(images) - wanted).norm() / wanted.norm()
    if not error < TOLERANCE:
        raise InputError(
            f"not exported: the folded backbone differs from the encoder by {error:.1e} on random "
            f"images, more than {TOLERANCE:.0e}"
        )


def model_args(method: LDAE) -> dict:
    """The arguments that make timm's registered ViT the shape of the encoder."""
    shape, tokenizer = method.denoiser.shape, method.tokenizer
    return {
        "img_size": tokenizer.img_size,
        "patch_size": shape.patch_size,
        "in_chans": tokenizer.in_chans,
        "num_classes": 0,
        "embed_dim": shape.embed_dim,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
        "mlp_ratio": shape.mlp_ratio,
        "class_token": False,
        "global_pool": "avg",
        "final_norm": False,
        "fc_norm": False,
        "act_layer": "gelu_tanh",
    }


def pretrained_cfg(method: LDAE) -> dict:
    """timm's record of the preprocessing; every key that it would inherit wrongly is set."""
    tokenizer = method.tokenizer
    side = tokenizer.img_size
    return {
        "tag": "ldae",
        "license": "other",
        "origin_url": "https://arxiv.org/abs/2401.14404",
        "input_size": (tokenizer.in_chans, side, side),
        "fixed_input_size": True,
        "num_classes": 0,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": tuple(round(value, 6) for value in tokenizer.pixel_mean.tolist()),
        "std": tuple(round(value, 6) for value in tokenizer.pixel_std.tolist()),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


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
