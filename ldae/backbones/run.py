"""A run's encoder as a backbone."""

import copy
from pathlib import Path

import torch
from torch import nn

from ldae.backbones.fold import TIMESTEP, features, fold, model_args, pretrained_cfg
from ldae.errors import InputError
from ldae.method import LDAE, build
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import settings_of
from ldae.runs.layout import CONFIG
from ldae.tokenizers import PatchTokenizer


def load_run(run: Path) -> tuple[LDAE, dict]:
    """The method of a run folder with the weights of its newest checkpoint, and that checkpoint.

    The moving average of the weights is taken where the run has one.

    Raises: InputError when the folder holds no pre-training, or one without a checkpoint yet.
    """
    config = settings_of(run, "pretraining")
    state = Checkpoints(run).load()
    if state is None:
        raise InputError(f"run folder {run} has no checkpoint yet")
    method = build(config, num_classes=len(state["describe"]["classes"]))
    try:
        method.load_state_dict(state["average"] or state["model"])
    except RuntimeError:
        raise InputError(f"run folder {run}: {CONFIG} is not that of its checkpoints") from None
    return method.eval(), state


class TokenizerAndEncoder(nn.Module):
    """What ``fold`` gives, where the tokenizer is a network that no convolution can stand for.

    It is graded as any backbone is, but it is no timm model and is not exported.
    """

    def __init__(self, method: LDAE, timestep: int) -> None:
        super().__init__()
        self.method, self.timestep = method, timestep
        self.pretrained_cfg, self.model_args = pretrained_cfg(method), model_args(method)
        self.pretrained_cfg["architecture"] = method.denoiser.shape.name

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return features(self.method, images, self.timestep)


def backbone_of(method: LDAE) -> nn.Module:
    """The encoder as evaluators see it: normalised images (B, C, H, W) to features (B, W).

    Raises: InputError as ``fold`` does.
    """
    if isinstance(method.tokenizer, PatchTokenizer):
        return fold(method)
    alone = copy.deepcopy(method).eval()
    alone.bf16 = False
    return TokenizerAndEncoder(alone, min(TIMESTEP, len(method.sigma) - 1))


def backbone_of_run(run: str | Path) -> nn.Module:
    """The encoder of a run's newest checkpoint, see ``backbone_of``.

    Raises: InputError as ``load_run`` and ``fold`` do.
    """
    method, _ = load_run(Path(run))
    return backbone_of(method)
