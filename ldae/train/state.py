"""What a run has learnt: the weights, their moving average and the optimizer's moments."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ldae import distributed
from ldae.settings import OptimSettings, SystemSettings
from ldae.train.optim import adamw
from ldae.train.parallel import spread


class State:
    """A model on its device, spread over the ranks, and what its training needs beside it."""

    def __init__(
        self,
        model: nn.Module,
        optim: OptimSettings,
        system: SystemSettings,
        device: torch.device,
        compiled: bool,
    ) -> None:
        self.model, self.decay, self.device = model, optim.ema, device
        self.average = copy.deepcopy(model).requires_grad_(False) if optim.ema else None
        self.spread = spread(
            model, self.average, fsdp=system.fsdp, device=device, compiled=compiled
        )
        self.optimizer = adamw(model, optim)
        self._first = {module: _numbers(module) for module in model.modules()}
        self._host = HostCopy(device)

    def update(self) -> None:
        """One step of the optimizer, and of the average behind it."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            _move_average(self.average, self.model, self.decay)

    def shown(self) -> nn.Module:
        """The model as a run shows it: the moving average where there is one."""
        return self.spread.alone(self.average or self.model)

    def capture(self) -> tuple[dict[str, Any] | None, torch.cuda.Event | None]:
        """A copy on the host, of rank 0 only, and on a GPU what to wait for before it is read.

        The former copy is overwritten. A collective where the model is in shares.
        """
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state["average"] = self.average.state_dict() if self.average else None
        if self.spread.in_shares:
            state = each_tensor(state, lambda _, part: self._host.keep(_, self.spread.whole(part)))
        elif distributed.is_main():
            state = each_tensor(state, self._host.keep)
        return (state, self._host.event()) if distributed.is_main() else (None, None)

    def restore(self, state: dict[str, Any]) -> None:
        """Put what was captured, on any number of ranks, in place."""
        for module, kept in ((self.model, "model"), (self.average, "average")):
            if module:
                own = module.state_dict()
                mine = {n: self._own(part, own.get(n)) for n, part in state[kept].items()}
                module.load_state_dict(mine)
        groups = self.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        moments = {
            number: {
                name: self._own(part, parameters[number]) if part.ndim else part
                for name, part in moments.items()
            }
            for number, moments in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})

    def _own(self, part: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
        return part if like is None else self.spread.own(part, like)

    def forget(self) -> None:
        """Let modules count anew.

        What one counts in plain numbers, as TokenizerLoss does its calls, holds only while training
        goes forwards by one batch after the other.
        """
        for module, numbers in self._first.items():
            vars(module).update(numbers)


class HostCopy:
    """Tensors on the host, in memory that is used again: pinned where they come from a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.kept = device, {}

    def keep(self, name: tuple, value: torch.Tensor) -> torch.Tensor:
        """A copy of ``value``, which on a GPU is only begun."""
        if not distributed.is_main():
            return value
        known = self.kept.get(name)
        if known is None or known.shape != value.shape:
            pinned = value.device.type == "cuda"
            known = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        self.kept[name] = known
        return known.copy_(value.detach(), non_blocking=True)

    def event(self) -> torch.cuda.Event | None:
        """What happens when the copies that were begun are complete."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event


def each_tensor(value: Any, change: Callable, name: tuple = ()) -> Any:
    """A nested state with ``change(name, tensor)`` in the place of each tensor."""
    if isinstance(value, torch.Tensor):
        return change(name, value)
    if isinstance(value, dict):
        return {key: each_tensor(part, change, (*name, key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = enumerate(value)
        return type(value)(each_tensor(part, change, (*name, n)) for n, part in parts)
    return value


def _numbers(module: nn.Module) -> dict[str, bool | int | float]:
    kept = {n: part for n, part in vars(module).items() if isinstance(part, bool | int | float)}
    kept.pop("training")  # which is the loop's, and no count
    return kept


@torch.no_grad()
def _move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model; the statistics of a BatchNorm, too."""
    for kind in (nn.Module.parameters, nn.Module.buffers):
        pairs = [pair for pair in zip(kind(average), kind(model)) if pair[0].is_floating_point()]
        if pairs:
            torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - decay)
