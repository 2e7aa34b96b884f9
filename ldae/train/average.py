"""The moving average of a model's parameters and buffers."""

import torch
from torch import nn


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Set average to decay * average + (1 - decay) * model, for parameters and buffers.

    The average may hold a part of the model; parts of the same name belong together.
    """
    for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
        current = dict(kind(model))
        pairs = [(part, current[name]) for name, part in kind(average) if part.is_floating_point()]
        if pairs:
            torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - decay)
