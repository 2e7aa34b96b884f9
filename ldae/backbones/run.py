"""Load the method of a run, and open its encoder as a backbone."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldae.backbones.fold import LDAE_URL, fold, pretrained_cfg, stock_vit
from ldae.errors import InputError
from ldae.method import LDAE, build
from ldae.models.contract import NoPlainViT
from ldae.precision import unchanged_generators
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import KINDS, Exported, Opening, pretraining_in, settings_of
from ldae.runs.layout import CONFIG


def load_method(run: Path, kind: str = "pretraining") -> tuple[Any, dict]:
    """Load the newest checkpoint of a pre-training; return its method and the whole checkpoint.

    The method has the moving average of the weights if the run has one.

    Raises: InputError when the folder holds no run of this kind, or no checkpoint yet.
    """
    config = settings_of(run, kind)
    state = Checkpoints(run).load()
    if state is None:
        raise InputError(f"run folder {run} has no checkpoint yet")
    build_method = KINDS[kind].functions().build
    with unchanged_generators():
        method = build_method(config, num_classes=len(state["describe"]["classes"]))
    try:
        method.load_state_dict(state["average"] or state["model"])
    except RuntimeError:
        raise InputError(f"run folder {run}: {CONFIG} does not fit its checkpoints") from None
    return method.eval(), state


class TokenizerAndEncoder(nn.Module):
    """The tokenizer and the encoder of a run, for an encoder that cannot become a timm ViT.

    This is a backbone for evaluations, but not a timm model, and it cannot be exported.
    """

    def __init__(self, method: LDAE, timestep: int) -> None:
        super().__init__()
        self.method, self.timestep = method, timestep
        name = type(method.denoiser).__name__
        self.pretrained_cfg = pretrained_cfg(method.tokenizer, LDAE_URL) | {"architecture": name}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.method.features(images, self.timestep)


def backbone_of(method: LDAE, verify: bool = True) -> nn.Module:
    """Return the encoder as a backbone: normalised images (B, C, H, W) -> features (B, W).

    It is a timm ViT, or a ``TokenizerAndEncoder`` when no timm ViT computes the same.

    Raises: InputError when ``verify`` finds that the folded encoder has other features.
    """
    try:
        return fold(method, verify=verify)
    except NoPlainViT:
        method = copy.deepcopy(method).eval()
        method.bf16 = False
        return TokenizerAndEncoder(method, method.feature_timestep)


def exported(method: LDAE, timestep: int | None = None) -> Exported:
    """Return the encoder at a fixed t, by default its ``feature_timestep``, as a timm ViT.

    Raises: NoPlainViT and InputError as ``fold``, and InputError for a t that does not exist.
    """
    own = method.feature_timestep
    timestep = own if timestep is None else timestep
    if not 0 <= timestep < len(method.sigma):
        raise InputError(f"timestep {timestep} is not in 0 .. {len(method.sigma) - 1}")
    tokenizer, vit = method.tokenizer, fold(method, timestep)
    others = ", although it has a class token" if vit.has_class_token else ", no class token"
    return Exported(
        vit,
        "denoising-autoencoder",
        "An image encoder pre-trained by latent denoising "
        f"([l-DAE]({LDAE_URL})) with\n"
        f"ldae: a plain ViT, averaged features of the patches{others}.",
        {
            "tokenizer": f"{type(tokenizer).__name__}, d = {tokenizer.dim}, "
            f"scale {tokenizer.scale}",
            "folded at": f"t = {timestep}, clean input",
        },
        f" at t = {own}",
    )


def reconstruct(
    method: LDAE, images: torch.Tensor, positions: torch.Tensor, level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return denoised and clean pictures (B, C, H, W) of uint8 images, in [0, 1].

    Args:
        positions: determine the noise (B,).
        level: the place of t in the noise schedule, 0 to 1.
    """
    t = round(level * (len(method.sigma) - 1))
    clean, _, denoised = method.denoise_images(images, positions, t)
    return denoised, clean


DENOISING = Opening(build, backbone_of, stock_vit, exported, reconstruct)
"""How graders and the export open a denoising pre-training."""


def backbone_of_run(run: str | Path) -> nn.Module:
    """Return the encoder of a pre-training's newest checkpoint as a backbone.

    Its ``images_seen`` is the checkpoint's.

    Raises: InputError as ``load_method``, and as the kind's ``Opening.backbone``.
    """
    kind = pretraining_in(Path(run))
    method, state = load_method(Path(run), kind)
    backbone = KINDS[kind].functions().backbone(method, True)
    backbone.images_seen = state["images_seen"]
    return backbone


def control_of_run(run: str | Path) -> nn.Module:
    """Return the untrained control of a run's encoder: timm's ViT with random weights.

    Raises: InputError as ``load_method``, and as the kind's ``Opening.control``.
    """
    kind = pretraining_in(Path(run))
    method, _ = load_method(Path(run), kind)
    return KINDS[kind].functions().control(method)
