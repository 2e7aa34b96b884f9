"""The optimizer, and the learning rate as a function of images seen."""

import math

import torch
from torch import nn

from ldae.settings import Optim


def adamw(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters; vectors and scalars are never decayed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak_lr(optim), betas=tuple(optim.betas), fused=True)


def peak_lr(optim: Optim) -> float:
    """lr = blr * batch_size / 256 (Goyal et al. 2017)."""
    return optim.blr * optim.batch_size / 256


def lr_at(seen: int, *, peak: float, warmup: int, total: int) -> float:
    """The rate after ``seen`` of ``total`` images: linear to ``peak`` in ``warmup``, half-cosine to 0."""
    if seen < warmup:
        return peak * seen / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (seen - warmup) / max(1, total - warmup)))
