"""Fold an encoder into a stock timm VisionTransformer, and start an encoder from such a ViT."""

import copy

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from ldae import tokenizers
from ldae.errors import InputError
from ldae.method import LDAE
from ldae.models.contract import NoPlainViT, PlainViT
from ldae.models.vit import resized_state
from ldae.pixel_statistics import PixelStatistics
from ldae.tokenizers import PatchTokenizer

LDAE_URL = "https://arxiv.org/abs/2401.14404"
TOLERANCE = 1e-5  # relative, in float32


@torch.no_grad()
def fold(method: LDAE, timestep: int | None = None, verify: bool = True) -> VisionTransformer:
    """Fold the encoder at a fixed t and with clean input into a VisionTransformer in eval mode.

    The ViT maps images (B, C, H, W), normalised by the tokenizer's pixel statistics, to averaged
    features (B, W). Projection, latent scale, gamma_t, inverse projection and embedding are all
    affine in a patch, so they become the one convolution of the patch embedding. Class-conditional
    rows get the null label. The ``timestep`` of the ViT is t.

    Args:
        timestep: the t; by default the method's ``feature_timestep``.
        verify: compare folded and unfolded features of random images.

    Raises: NoPlainViT when the tokenizer is a network or the encoder is not a plain ViT; InputError
        when folded and unfolded features differ by more than 1e-5.
    """
    if not isinstance(method.tokenizer, PatchTokenizer):
        raise NoPlainViT(
            f"tokenizer.name {tokenizers.name_of(method.tokenizer)} is a network, which cannot be "
            "folded into a timm ViT"
        )
    vit = stock_vit(method).eval()
    t = method.feature_timestep if timestep is None else timestep
    exact = copy.deepcopy(method).cpu().double().eval()
    exact.bf16 = False
    condition = exact.denoiser.condition(torch.tensor([t]))
    state = exact.denoiser.plain_state(condition) | _fold_embedding(exact, t)
    if vit.patch_embed.proj.bias is None:  # as timm has it before a pre_norm
        bias, prefix = state.pop("patch_embed.proj.bias"), vit.num_prefix_tokens
        first, others = state["pos_embed"].tensor_split([prefix], dim=1)
        state["pos_embed"] = torch.cat([first, others + bias], dim=1)
    vit.load_state_dict({name: value.float() for name, value in state.items()})
    if verify:
        _verify(exact, vit, t)
    vit.timestep = t
    return vit


def stock_vit(method: LDAE) -> VisionTransformer:
    """Build timm's ViT of the encoder's architecture, with timm's random initialisation.

    Its ``model_args`` are the arguments with which timm builds it again.

    Raises: NoPlainViT when the encoder is not a plain ViT.
    """
    tokenizer = method.tokenizer
    return build_vit(method.denoiser.plain_vit(), tokenizer, tokenizer.patch_size, LDAE_URL)


def build_vit(
    plain: PlainViT, pixels: PixelStatistics, patch_size: int, url: str
) -> VisionTransformer:
    """Build a ViT of timm for images of these statistics, with timm's random initialisation.

    Its ``model_args`` are the arguments with which timm builds it again. ``url`` is the address of
    the method that pre-trains it.
    """
    args = {
        "img_size": pixels.img_size,
        "patch_size": patch_size,
        "in_chans": pixels.in_chans,
        "num_classes": 0,
        **plain.args,
    }
    vit = timm.create_model(plain.name, pretrained_cfg=pretrained_cfg(pixels, url), **args)
    vit.model_args = args
    return vit


def _fold_embedding(method: LDAE, t: int) -> dict[str, torch.Tensor]:
    """Return the affine map from a normalised patch to its embedded token as a patch embedding."""
    tokenizer, embed = method.tokenizer, method.denoiser.embed
    matrix, offset = _patch_to_token(method, t)
    shape = (-1, tokenizer.in_chans, tokenizer.patch_size, tokenizer.patch_size)
    return {
        "patch_embed.proj.weight": (embed.weight @ matrix).reshape(shape),
        "patch_embed.proj.bias": embed(offset),
    }


def _patch_to_token(method: LDAE, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (in_dim, D) and a (in_dim,): the network's token for a clean patch x is A x + a."""
    unit = torch.eye(method.tokenizer.patch_dim, dtype=method.gamma.dtype)

    def token(patches: torch.Tensor) -> torch.Tensor:
        return method.network_input(method.gamma[t] * method.tokenizer.project(patches))

    offset = token(torch.zeros_like(unit[0]))
    return (token(unit) - offset).T, offset


def _verify(exact: LDAE, vit: VisionTransformer, t: int) -> None:
    """Compare the features of random images. Raises: InputError when they differ."""
    tokenizer = exact.tokenizer
    generator = torch.Generator().manual_seed(0)
    size = (4, tokenizer.in_chans, tokenizer.img_size, tokenizer.img_size)
    images = torch.randn(size, generator=generator)
    check_features(vit(images), exact.features(images.double(), t))


def check_features(exported: torch.Tensor, own: torch.Tensor) -> None:
    """Check that the features (B, W) of a timm ViT are an encoder's own features (B, W).

    Raises: InputError when they differ by more than ``TOLERANCE``.
    """
    error = (exported - own).norm() / own.norm()
    if not error < TOLERANCE:
        raise InputError(
            f"not exported: timm's ViT differs from the encoder by {error:.1e} on random images, "
            f"more than {TOLERANCE:.0e}"
        )


def pretrained_cfg(pixels: PixelStatistics, url: str) -> dict:
    """Return timm's record of the preprocessing, with the address ``url`` of the method.

    It sets every key that timm would otherwise fill with the value of its own weights.
    """
    side = pixels.img_size
    return {
        "tag": "ldae",
        "origin_url": url,
        "input_size": (pixels.in_chans, side, side),
        "fixed_input_size": True,
        "num_classes": 0,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": tuple(round(value, 6) for value in pixels.pixel_mean.tolist()),
        "std": tuple(round(value, 6) for value in pixels.pixel_std.tolist()),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


@torch.no_grad()
def init_from(method: LDAE, vit: VisionTransformer) -> float:
    """Set the encoder's weights so that its tokens at every t are those of a plain ViT.

    The encoder must have the ViT's architecture, and the tokenizer must be fitted. The tokens are
    equal on images without noise that lie within the tokenizer's axes: for an orthonormal
    tokenizer, images that it gives back unchanged. Positions are interpolated for another number of
    patches. The decoder stays as it is.

    Returns: the share of the norm of the patch embedding that reads what the tokenizer drops.
    """
    exact = copy.deepcopy(method).cpu().double()
    tokenizer, denoiser = exact.tokenizer, exact.denoiser
    assert isinstance(tokenizer, PatchTokenizer)
    weight, bias = _embedding_of(vit, tokenizer)
    matrix, offset = _patch_to_token(exact, method.feature_timestep)
    # The network sees a patch x as A x + a. The embedding W' reads from it what W reads from the
    # part of x in the row space of A. The other part is that of the image given back for x = 0.
    # Singular values below float32's precision carry nothing of W.
    embed = weight @ torch.linalg.pinv(matrix, rtol=1e-6)
    dropped = weight - embed @ matrix
    origin = tokenizer.inverse(tokenizer.project(torch.zeros_like(dropped[0])))
    method.denoiser.embed.weight.copy_(embed)
    method.denoiser.embed.bias.copy_(bias + dropped @ origin - embed @ offset)
    method.denoiser.load_plain_state(resized_state(vit, denoiser.side))
    if method.feature_target is not None:
        method.feature_target.restart(method.denoiser)
    return float(dropped.norm() / weight.norm())


def _embedding_of(
    vit: VisionTransformer, pixels: PixelStatistics
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a ViT's patch embedding, W (width, D) and b (width,).

    It is that for patches normalised by ``pixels``, where the ViT has statistics of its own.
    """
    weight = vit.patch_embed.proj.weight.double()
    bias = vit.patch_embed.proj.bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
    mean, std = (weight.new_tensor(vit.pretrained_cfg[key]) for key in ("mean", "std"))
    shift = (pixels.pixel_mean - mean) / std
    bias = bias + weight.sum((2, 3)) @ shift
    return (weight * (pixels.pixel_std / std)[:, None, None]).flatten(1), bias
