"""The start of an MAE pre-training from another MAE: a run, its export, or a published file."""

from pathlib import Path
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer

from ldae.backbones.open import load_backbone
from ldae.backbones.run import load_run
from ldae.backbones.weights import StateDict, read_checkpoint
from ldae.backbones.whitening import drop_whitening
from ldae.errors import InputError
from ldae.mae.network import MAE
from ldae.patches import sincos_positions
from ldae.runs.kinds import kind_of

# The decoder's names in published files -> ours.
_DECODER = {
    "mask_token": "mask_token",
    "decoder_embed.": "embed.",
    "decoder_blocks.": "blocks.",
    "decoder_norm.": "norm.",
    "decoder_pred.": "pred.",
}


class Start(NamedTuple):
    """The weights to start from."""

    encoder: StateDict
    """Without the positions, which are constants."""
    decoder: StateDict
    """Empty when the start has no decoder."""
    mean: torch.Tensor
    """Mean (C,) of the pixels, in [0, 1]."""
    std: torch.Tensor
    """Standard deviation (C,) of the pixels, in [0, 1]."""


def open_start(spec: str, mae: MAE) -> Start:
    """Open the weights that ``init_from`` names.

    Args:
        spec: a run folder of an MAE, an exported folder, or ``NAME@FILE`` for a checkpoint with
            MAE's published names, such as ``vit_base_patch16_224.mae@mae_pretrain_vit_base.pth``.
        mae: the network that will start from them.

    Raises: InputError naming ``spec`` when it cannot be opened, or is no MAE of these sizes.
    """
    name, at, file = spec.partition("@")
    published = _published(Path(file)) if at else {}
    vit = load_backbone(spec)
    if not isinstance(vit, VisionTransformer) or vit.num_prefix_tokens != 1:
        raise InputError(f"init_from {spec} is no ViT with a class token, as an MAE's encoder is")
    drop_whitening(vit)
    encoder = _without_positions(vit.state_dict())
    if at and (absent := encoder.keys() - published.keys()):
        raise InputError(f"init_from {file} is no whole {name}: it does not hold {min(absent)}")
    heads = vit.blocks[0].attn.num_heads, mae.encoder.blocks[0].attn.num_heads
    _check_shapes(spec, "an encoder", encoder, _without_positions(mae.encoder.state_dict()), heads)
    _check_positions(spec, vit)
    decoder: StateDict = {}
    if not at and kind_of(Path(spec)):
        own, _ = load_run(Path(spec), "mae")
        decoder = own.decoder.state_dict()
    elif at:
        decoder = _published_decoder(published, mae)
    if decoder:
        _check_shapes(spec, "a decoder", decoder, mae.decoder.state_dict())
    cfg = vit.pretrained_cfg
    return Start(encoder, decoder, torch.tensor(cfg["mean"]), torch.tensor(cfg["std"]))


@torch.no_grad()
def start_from(mae: MAE, start: Start) -> None:
    """Set the weights of the encoder, of the decoder if the start has one, and the statistics."""
    mae.encoder.load_state_dict(start.encoder, strict=False)
    if start.decoder:
        mae.decoder.load_state_dict(start.decoder)
    mae.pixels.set_pixel_stats(start.mean, start.std)


def _published(file: Path) -> StateDict:
    """Return the weights in a published file. Raises: InputError as ``read_checkpoint``."""
    content = read_checkpoint(file)
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise InputError(f"{file} holds no weights")
    return weights


def _published_decoder(published: StateDict, mae: MAE) -> StateDict:
    """Return the decoder in a published file by our names; empty when the file has none.

    Its patches are pixel by pixel, (p, p, C), where ours are channel by channel, (C, p, p).
    """
    decoder = {
        ours + name.removeprefix(theirs): value
        for name, value in published.items()
        for theirs, ours in _DECODER.items()
        if name.startswith(theirs)
    }
    if "mask_token" in decoder:
        decoder["mask_token"] = decoder["mask_token"].flatten(0, -2)
    for name in ("pred.weight", "pred.bias"):
        if name in decoder:
            pixels = decoder[name].unflatten(0, (-1, mae.pixels.in_chans))
            decoder[name] = pixels.transpose(0, 1).flatten(0, 1)
    return decoder


def _without_positions(state: StateDict) -> StateDict:
    return {name: value for name, value in state.items() if name != "pos_embed"}


def _check_shapes(
    spec: str, what: str, found: StateDict, wanted: StateDict, heads: tuple[int, int] = (0, 0)
) -> None:
    """Raises: InputError naming the first weight that differs."""
    for name in sorted(found.keys() | wanted.keys()):
        shapes = [tuple(state[name].shape) if name in state else None for state in (found, wanted)]
        if shapes[0] != shapes[1]:
            there, here = (shape or "missing" for shape in shapes)
            raise InputError(
                f"init_from {spec} holds {what} of another shape than this run's: {name} is "
                f"{there} there, {here} here"
            )
    if heads[0] != heads[1]:
        raise InputError(
            f"init_from {spec} has {heads[0]} attention heads, and model.num_heads is {heads[1]}"
        )


def _check_positions(spec: str, vit: VisionTransformer) -> None:
    """Raises: InputError for positions that were learned, since an MAE's are constants."""
    side = round(vit.patch_embed.num_patches**0.5)
    expected = sincos_positions(vit.embed_dim, side)
    found = vit.pos_embed[0, 1:]
    if found.shape != expected.shape or (found - expected).abs().max() > 1e-3:
        raise InputError(f"init_from {spec} has other positions than the constant ones of an MAE")
