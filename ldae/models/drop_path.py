"""Stochastic depth whose rate is a tensor, so that blocks of all rates share a compiled graph."""

import timm.layers
import torch
from torch import nn


class DropPath(nn.Module):
    """Leave a branch (B, ...) out for a share ``rate`` of the samples, and scale up the others.

    The mean of the branch stays. In evaluation nothing is left out.

    torch.compile takes the rate of timm's module for a constant, and compiles each block anew.

    Source: Huang et al. 2016; timm.layers.DropPath.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("kept", torch.tensor(1.0 - rate), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.rate:g}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        chosen = torch.rand((len(x), *(1,) * (x.ndim - 1)), device=x.device) < self.kept
        return x * (chosen / self.kept).to(x.dtype)


def set_drop_path(model: nn.Module) -> None:
    """Put this module in the place of each one of timm's in ``model``."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, timm.layers.DropPath):
                setattr(module, name, DropPath(child.drop_prob))
