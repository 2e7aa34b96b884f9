"""What a run has learnt: the weights, their moving average and the optimizer's moments."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ldae import distributed
from ldae.settings import ExecutionSettings, OptimSettings
from ldae.train.parallel import spread


class State:
    """A model on its device, spread over the ranks, its moving average and its optimizer."""

    def __init__(
        self,
        model: nn.Module,
        optim: OptimSettings,
        system: ExecutionSettings,
        device: torch.device,
        compiled: bool,
        optimizer: Callable[[nn.Module, OptimSettings], torch.optim.Optimizer],
    ) -> None:
        self.model, self.decay, self.device = model, optim.ema, device
        self.average = copy.deepcopy(model).requires_grad_(False) if optim.ema else None
        self.spread = spread(
            model, self.average, fsdp=system.fsdp, device=device, compiled=compiled
        )
        self.optimizer = optimizer(model, optim)
        self._first = {module: _numbers(module) for module in model.modules()}
        self._host = HostCopy(device)

    def update(self) -> None:
        """Step the optimizer, then the model's own buffers, then the moving average of both."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        if hasattr(self.model, "after_step"):
            self.model.after_step()
        if self.average:
            _move_average(self.average, self.model, self.decay)

    def shown(self) -> nn.Module:
        """Return the model that a run shows: the moving average where there is one."""
        return self.spread.alone(self.average or self.model)

    def capture(self) -> tuple[dict[str, Any] | None, torch.cuda.Event | None]:
        """Return a copy of the state on the host, and on a GPU an event that says it is complete.

        Only rank 0 gets them, the others None. The copy overwrites the former one. All ranks must
        call this where the model is in shares.
        """
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state["average"] = self.average.state_dict() if self.average else None
        if self.spread.in_shares or distributed.is_main():
            state = each_tensor(state, self._keep)
        return (state, self._host.event()) if distributed.is_main() else (None, None)

    def _keep(self, name: tuple, part: torch.Tensor) -> torch.Tensor:
        return self._host.keep(name, self.spread.whole(part))

    def restore(self, state: dict[str, Any]) -> None:
        """Load a captured state, whatever the number of ranks that captured it."""
        for module, kept in ((self.model, "model"), (self.average, "average")):
            if module:
                own = module.state_dict()
                mine = {n: self._own(part, own.get(n)) for n, part in state[kept].items()}
                module.load_state_dict(mine)
        groups = self.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]

        def moment(name: tuple, part: torch.Tensor) -> torch.Tensor:
            return self._own(part, parameters[name[0]]) if part.ndim else part

        moments = each_tensor(state["optimizer"]["state"], moment)
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})

    def _own(self, part: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
        return part if like is None else self.spread.own(part, like)

    def reset_counts(self) -> None:
        """Set what modules count in plain numbers, as TokenizerLoss its calls, back to the start.

        No checkpoint holds these counts, and they are right only while batch follows batch.
        """
        for module, numbers in self._first.items():
            vars(module).update(numbers)


class HostCopy:
    """Copies of tensors on the host, in memory that is used again: pinned for those of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.kept = device, {}

    def keep(self, name: tuple, value: torch.Tensor) -> torch.Tensor:
        """Return a copy of ``value``, on rank 0. On a GPU the copy may not be complete yet."""
        if not distributed.is_main():
            return value
        known = self.kept.get(name)
        if known is None or known.shape != value.shape:
            pinned = value.device.type == "cuda"
            known = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        self.kept[name] = known
        return known.copy_(value.detach(), non_blocking=True)

    def event(self) -> torch.cuda.Event | None:
        """Return an event that happens when all copies so far are complete; None on a CPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event


def each_tensor(tree: Any, change: Callable, name: tuple = ()) -> Any:
    """Return the tree of dicts, lists and tuples with ``change(name, tensor)`` for each tensor.

    The name of a tensor is the tuple of the keys and numbers that lead to it.
    """
    if isinstance(tree, torch.Tensor):
        return change(name, tree)
    if isinstance(tree, dict):
        return {key: each_tensor(part, change, (*name, key)) for key, part in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(each_tensor(part, change, (*name, n)) for n, part in enumerate(tree))
    return tree


def _numbers(module: nn.Module) -> dict[str, bool | int | float]:
    kept = {n: part for n, part in vars(module).items() if isinstance(part, bool | int | float)}
    kept.pop("training")  # the mode of the module, and no count
    return kept


@torch.no_grad()
def _move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Set average to decay * average + (1 - decay) * model, the statistics of a BatchNorm too."""
    for kind in (nn.Module.parameters, nn.Module.buffers):
        pairs = [pair for pair in zip(kind(average), kind(model)) if pair[0].is_floating_point()]
        if pairs:
            torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - decay)
