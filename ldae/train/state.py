"""The state of a training: the model, its moving average and the optimizer."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ldae import distributed
from ldae.settings import ExecutionSettings, OptimSettings
from ldae.train.average import move_average
from ldae.train.parallel import parallelize, uses_cuda_graphs


class State:
    """A model on its device and on all ranks, with its moving average and its optimizer."""

    def __init__(
        self,
        model: nn.Module,
        optim: OptimSettings,
        system: ExecutionSettings,
        device: torch.device,
        compiled: bool,
        optimizer: Callable[[nn.Module, OptimSettings], torch.optim.Optimizer],
    ) -> None:
        self.model, self.device, self.compiled = model, device, compiled
        self.cuda_graphs = uses_cuda_graphs(system, device, compiled)
        self.average = copy.deepcopy(model).requires_grad_(False) if optim.ema else None
        self.parallel = parallelize(model, self.average, system, device, compiled)
        self.optimizer = optimizer(model, optim)
        self._initial_counts = {
            module: _plain(module, bool | int | float) for module in model.modules()
        }
        self._host = HostCopy(device)
        if self.cuda_graphs:  # the first gradients would otherwise lie in a graph's memory
            for parameter in self._trained():
                parameter.grad = torch.zeros_like(parameter)

    def update(self, decay: float) -> None:
        """Step the optimizer, then the model's own buffers, then the moving average of both.

        ``decay`` is the share of the former average in the new one.
        """
        self.optimizer.step()
        self._zero_grad()
        if hasattr(self.model, "after_step"):
            self.model.after_step()
        if self.average:
            move_average(self.average, self.model, decay)

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self.cuda_graphs)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Undo what passes inside of the context do: gradients, buffers, numbers and lists."""
        kept = {
            module: _plain(module, bool | int | float | list) for module in self.model.modules()
        }
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            yield
        finally:
            self._zero_grad()
            for module, values in kept.items():
                vars(module).update(values)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def reserve(self) -> list[torch.Tensor]:
        """Allocate the memory that a later step needs beside the passes of a first one.

        This is the memory of AdamW's two moments before its first step, and a thirty-second part of
        a GPU, for communication and for gaps between tensors.
        """
        reserved = []
        if not self.optimizer.state:
            reserved += [torch.empty_like(part) for part in self._trained() for _ in range(2)]
        if self.device.type == "cuda":
            spare = torch.cuda.get_device_properties(self.device).total_memory // 32
            reserved.append(torch.empty(spare, dtype=torch.uint8, device=self.device))
        return reserved

    def inference_model(self, averaged: bool = True) -> nn.Module:
        """Return the moving average if it is wanted and there is one, else the model."""
        model = self.average if averaged and self.average else self.model
        return self.parallel.full_module(model)

    def capture(self) -> tuple[dict[str, Any] | None, torch.cuda.Event | None]:
        """Return a copy of the state on the host, and on a GPU the event that completes the copy.

        Ranks other than 0 get None. Each copy overwrites the one before. All ranks must call this
        when the model is sharded: they gather one tensor at a time, and only rank 0 keeps it.
        """
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state["average"] = self.average.state_dict() if self.average else None
        if self.parallel.sharded or distributed.is_main():
            state = map_tensors(state, self._copy)
        return (state, self._host.event()) if distributed.is_main() else (None, None)

    def _copy(self, name: tuple, part: torch.Tensor) -> torch.Tensor | None:
        full = self.parallel.full_tensor(part)
        return self._host.copy(name, full) if distributed.is_main() else None

    def restore(self, state: dict[str, Any]) -> None:
        """Load a captured state; the number of ranks that captured it does not matter."""
        for module, key in ((self.model, "model"), (self.average, "average")):
            if module:
                current = module.state_dict()
                shards = {n: self._shard(part, current.get(n)) for n, part in state[key].items()}
                module.load_state_dict(shards)
        parameters = self._trained()

        def moment(name: tuple, part: torch.Tensor) -> torch.Tensor:
            return self._shard(part, parameters[name[0]]) if part.ndim else part

        moments = map_tensors(state["optimizer"]["state"], moment)
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})

    def _shard(self, part: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
        return part if like is None else self.parallel.shard(part, like)

    def reset_counts(self) -> None:
        """Reset the counters that modules keep as plain numbers, as TokenizerLoss does.

        No checkpoint holds these counters, and they are right only if no batch is left out.
        """
        for module, counts in self._initial_counts.items():
            vars(module).update(counts)


class HostCopy:
    """Copies of tensors on the host. Their memory is reused, and pinned for tensors of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.buffers = device, {}

    def copy(self, name: tuple, value: torch.Tensor) -> torch.Tensor:
        """Return a copy of ``value``. On a GPU the copy may not be complete yet."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != value.shape:
            pinned = value.device.type == "cuda"
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        self.buffers[name] = buffer
        return buffer.copy_(value.detach(), non_blocking=True)

    def event(self) -> torch.cuda.Event | None:
        """Return the event at which all copies so far are complete; None on a CPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event


def map_tensors(tree: Any, change: Callable, name: tuple = ()) -> Any:
    """Replace each tensor in a tree of dicts, lists and tuples by ``change(name, tensor)``.

    The name of a tensor is the tuple of the keys and indices that lead to it.
    """
    if isinstance(tree, torch.Tensor):
        return change(name, tree)
    if isinstance(tree, dict):
        return {key: map_tensors(part, change, (*name, key)) for key, part in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(part, change, (*name, n)) for n, part in enumerate(tree))
    return tree


def _plain(module: nn.Module, kind: Any) -> dict[str, Any]:
    """Return copies of a module's attributes of the types ``kind``, except for ``training``."""
    values = {name: value for name, value in vars(module).items() if isinstance(value, kind)}
    values.pop("training")
    return {name: copy.copy(value) for name, value in values.items()}
