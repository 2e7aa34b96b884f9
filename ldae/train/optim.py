"""AdamW, and the learning rate as a function of the images seen."""

import math

import torch
from torch import nn

from ldae.settings import OptimSettings


def adamw(model: nn.Module, optim: OptimSettings) -> torch.optim.AdamW:
    """Return a fused AdamW over the trainable parameters; vectors and scalars are never decayed.

    A method ``parameter_groups(weight_decay)`` of the model declares other groups, which may have
    an ``lr_scale`` (see ``set_lr``).
    """
    if hasattr(model, "parameter_groups"):
        groups = model.parameter_groups(optim.weight_decay)
    else:
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, lr=peak_lr(optim), betas=optim.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to ``lr`` times its ``lr_scale``, by default 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def peak_lr(optim: OptimSettings) -> float:
    """Return lr = blr * batch_size / 256.

    Source: Goyal et al. 2017, the linear scaling rule.
    """
    return optim.blr * optim.batch_size / 256


def ema_decay(step: int, optim: OptimSettings) -> float:
    """Return the decay of the moving average after so many earlier steps.

    With a warm-up, the decay rises from 0 to ``optim.ema``, so the initial weights have no share in
    the average.

    Source: timm's ModelEmaV3 with use_warmup.
    """
    return min(optim.ema, 1 - (1 + step) ** (-2 / 3)) if optim.ema_warmup else optim.ema


def lr_at(seen: int, *, peak: float, warmup: int, total: int, minimum: float = 0.0) -> float:
    """Return the learning rate after ``seen`` of ``total``, in any one unit: images or steps.

    The rate rises linearly from 0 to ``peak`` over ``warmup``, then falls as a half-cosine to
    ``minimum``.
    """
    if seen < warmup:
        return peak * seen / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (seen - warmup) / max(1, total - warmup)))
    return minimum + (peak - minimum) * cosine
