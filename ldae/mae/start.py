"""The start of an MAE pre-training from another MAE: a run, its export, or a published file."""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer

from ldae.backbones.open import load_backbone
from ldae.backbones.run import load_method
from ldae.backbones.weights import StateDict, read_checkpoint
from ldae.backbones.whitening import drop_whitening
from ldae.errors import InputError
from ldae.mae.network import MAE
from ldae.mae.settings import MAEConfig
from ldae.models.vit import read_vit
from ldae.patches import is_sincos
from ldae.pretraining.start import decide, decided_before
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

    spec: str
    """The value of ``init_from``."""
    encoder: StateDict
    """The encoder's weights, without the positions, which are constants."""
    decoder: StateDict
    """The decoder's weights; empty when the start has no decoder."""
    mean: torch.Tensor
    """Mean (C,) of the pixels, in [0, 1]."""
    std: torch.Tensor
    """Standard deviation (C,) of the pixels, in [0, 1]."""


def open_start(config: MAEConfig, run: Path) -> tuple[MAEConfig, Start | None]:
    """Open the weights that ``init_from`` names, and take what they decide into the settings.

    These are the encoder's sizes and the statistics of the pixels that it was trained on.

    ``init_from`` is a run folder of an MAE, an exported folder, or ``NAME@FILE`` for a checkpoint
    with MAE's published names, such as ``vit_base_patch16_224.mae@mae_pretrain_vit_base.pth``. A
    run that resumes has all of this in its own settings, and needs no start.

    Returns: the settings, and the weights or None.

    Raises: InputError naming the start when it cannot be opened or is no MAE, and when the settings
        name another size or other statistics.
    """
    spec = config.init_from
    if not spec:
        return config, None
    if resumed := decided_before(config, run, "mae"):
        return resumed, None
    name, at, file = spec.partition("@")
    vit = load_backbone(name if at else spec, random_init=bool(at))
    if not isinstance(vit, VisionTransformer) or vit.cls_token is None:
        raise InputError(f"init_from {spec} is no ViT with a class token, as an MAE's encoder is")
    drop_whitening(vit)
    encoder, decoder = vit.state_dict(), {}
    if at:
        encoder, decoder = _published(Path(file), config.data.in_chans)
    elif kind_of(Path(spec)) == "mae":
        decoder = load_method(Path(spec), "mae")[0].decoder.state_dict()
    _check_positions(spec, encoder.pop("pos_embed", torch.zeros(1, 1, 1)))
    try:
        shape, _ = read_vit(vit)
    except InputError as error:
        raise InputError(f"init_from {spec} is not a plain ViT: {error}") from None
    mean, std = (tuple(vit.pretrained_cfg[key]) for key in ("mean", "std"))
    leaves = {f"model.{size}": value for size, value in asdict(shape).items()}
    config = decide(config, leaves | {"data.mean": mean, "data.std": std})
    return config, Start(spec, encoder, decoder, torch.tensor(mean), torch.tensor(std))


@torch.no_grad()
def start_from(mae: MAE, start: Start) -> None:
    """Set the encoder's weights, the pixel statistics, and the decoder's weights if there are any.

    Raises: InputError when the network has other shapes.
    """
    own = mae.encoder.state_dict()
    own.pop("pos_embed")
    _check_shapes(start.spec, "an encoder", start.encoder, own)
    if start.decoder:
        _check_shapes(start.spec, "a decoder", start.decoder, mae.decoder.state_dict())
    mae.encoder.load_state_dict(start.encoder, strict=False)
    if start.decoder:
        mae.decoder.load_state_dict(start.decoder)
    mae.pixels.set_pixel_stats(start.mean, start.std)


def _published(file: Path, chans: int) -> tuple[StateDict, StateDict]:
    """Return the encoder in a published file, and the decoder by our names, empty if it has none.

    The decoder's patches are pixel by pixel, (p, p, C), where ours are by channel, (C, p, p).

    Raises: InputError as ``read_checkpoint``, and for a file without weights.
    """
    content = read_checkpoint(file)
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or "cls_token" not in weights:
        raise InputError(f"init_from {file} does not hold the weights of a published MAE")
    encoder, decoder = {}, {}
    for name, value in weights.items():
        theirs = next(filter(name.startswith, _DECODER), None)
        if theirs:
            decoder[_DECODER[theirs] + name.removeprefix(theirs)] = value
        elif name != "decoder_pos_embed":  # constants
            encoder[name] = value
    if decoder:
        decoder["mask_token"] = decoder["mask_token"].flatten(0, -2)
        for name in ("pred.weight", "pred.bias"):
            pixels = decoder[name].unflatten(0, (-1, chans))
            decoder[name] = pixels.transpose(0, 1).flatten(0, 1)
    return encoder, decoder


def _check_shapes(spec: str, what: str, found: StateDict, wanted: StateDict) -> None:
    """Check that two state dicts have the same names and shapes; ``what`` names the network.

    Raises: InputError naming the first weight that differs.
    """
    for name in sorted(found.keys() | wanted.keys()):
        shapes = [tuple(state[name].shape) if name in state else None for state in (found, wanted)]
        if shapes[0] != shapes[1]:
            there, here = (shape or "missing" for shape in shapes)
            raise InputError(
                f"init_from {spec} holds {what} of another shape than this run's: {name} is "
                f"{there} there, {here} here"
            )


def _check_positions(spec: str, pos_embed: torch.Tensor) -> None:
    """Check the positions (1, 1 + N, W) of an encoder, of any number of patches N.

    Raises: InputError for learned positions, since an MAE's are constants.
    """
    if not is_sincos(pos_embed[0, 1:]):
        raise InputError(f"init_from {spec} has learned positions, and an MAE has sine-cosine ones")
