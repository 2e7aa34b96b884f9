"""Open the encoder of a run as a backbone."""

import copy
from pathlib import Path

import torch
from torch import nn

from ldae.backbones.fold import default_timestep, fold, pretrained_cfg, stock_vit
from ldae.errors import InputError
from ldae.method import LDAE, build
from ldae.models.contract import NoPlainViT
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import settings_of
from ldae.runs.layout import CONFIG


def load_run(run: Path) -> tuple[LDAE, dict]:
    """Load the newest checkpoint of a run folder; return its method and the whole checkpoint.

    The method has the moving average of the weights if the run has one.

    Raises: InputError when the folder holds no pre-training, or no checkpoint yet.
    """
    config = settings_of(run, "pretraining")
    state = Checkpoints(run).load()
    if state is None:
        raise InputError(f"run folder {run} has no checkpoint yet")
    method = build(config, num_classes=len(state["describe"]["classes"]))
    try:
        method.load_state_dict(state["average"] or state["model"])
    except RuntimeError:
        raise InputError(f"run folder {run}: {CONFIG} does not fit its checkpoints") from None
    return method.eval(), state


class TokenizerAndEncoder(nn.Module):
    """The tokenizer and the encoder of a run, when no timm ViT computes the same.

    This is a backbone for evaluations, but not a timm model, and it cannot be exported.
    """

    def __init__(self, method: LDAE, timestep: int) -> None:
        super().__init__()
        self.method, self.timestep = method, timestep
        name = type(method.denoiser).__name__
        self.pretrained_cfg = pretrained_cfg(method) | {"architecture": name}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.method.features(images, self.timestep)


def backbone_of(method: LDAE, verify: bool = True) -> nn.Module:
    """Return the encoder as a backbone: normalised images (B, C, H, W) -> features (B, W).

    Raises: InputError when the encoder is a plain ViT, and the fold is wrong as far as ``verify``
        looks.
    """
    try:
        return fold(method, verify=verify)
    except NoPlainViT:
        method = copy.deepcopy(method).eval()
        method.bf16 = False
        return TokenizerAndEncoder(method, default_timestep(method))


def backbone_of_run(run: str | Path) -> nn.Module:
    """Return the encoder of a run's newest checkpoint as a backbone, see ``backbone_of``.

    Its ``images_seen`` is the checkpoint's.

    Raises: InputError as ``load_run`` and ``backbone_of`` do.
    """
    method, state = load_run(Path(run))
    backbone = backbone_of(method)
    backbone.images_seen = state["images_seen"]
    return backbone


def control_of_run(run: str | Path) -> nn.Module:
    """Return the untrained control of a run's encoder: timm's ViT with random weights.

    Raises: InputError as ``load_run`` and ``stock_vit`` do.
    """
    with torch.random.fork_rng(devices=[]):  # the seed of the run must not decide the control
        method, _ = load_run(Path(run))
    return stock_vit(method)
