"""The activations of a ViT's MLPs."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_act_layer
from torch import nn


class GELU(nn.Module):
    """GELU in its tanh approximation, as in DiT."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return _SigmoidGELU.apply(x)
        return F.gelu(x, approximate="tanh")


class _SigmoidGELU(torch.autograd.Function):
    """The same function as x sigmoid(2 u), since (1 + tanh u) / 2 = sigmoid(2 u).

    Compiled for a CPU, the exp of a sigmoid is many times faster than tanh. The backward pass
    computes the sigmoid anew, because it would be stored in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        y = x.float()
        return (y * _SigmoidGELU.gate(y)).to(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        y = x.float()
        gate = _SigmoidGELU.gate(y)
        two_u_slope = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * y * y)
        return (gradient.float() * gate * (1 + y * (1 - gate) * two_u_slope)).to(gradient)

    @staticmethod
    def gate(y: torch.Tensor) -> torch.Tensor:
        """Return sigmoid(2 u) for u = sqrt(2 / pi) (y + 0.044715 y^3)."""
        return torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y * y * y))


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu_tanh": GELU,
    "gelu": get_act_layer("gelu"),
    "quick_gelu": get_act_layer("quick_gelu"),
}
"""The activations by timm's names."""


def name_of(activation: nn.Module) -> str | None:
    """Return the name in ``ACTIVATIONS`` of the function that a layer computes, or None."""
    x = torch.linspace(-4, 4, 81, device="cpu")
    for name, layer in ACTIVATIONS.items():
        if torch.allclose(activation(x), layer()(x), rtol=0, atol=1e-5):
            return name
    return None
