"""Spread a model over the ranks: a copy on each (DDP), or a share of it on each (FSDP2)."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldae import distributed
from ldae.errors import InputError


class Copies:
    """The whole model on every rank, with gradients that are averaged over the ranks.

    ``network`` is the module to call.
    """

    in_shares = False

    def __init__(self, model: nn.Module, device: torch.device, compiled: bool) -> None:
        self.network = torch.compile(model) if compiled else model
        if distributed.world_size() > 1:
            on = [device] if device.type == "cuda" else None
            with warnings.catch_warnings():  # newer torch has another name for the last argument
                warnings.simplefilter("ignore", FutureWarning)
                self.network = DistributedDataParallel(
                    self.network, device_ids=on, broadcast_buffers=False
                )

    def averaging(self, now: bool) -> AbstractContextManager:
        """Return the context of one forward and backward pass.

        ``now``: average all gradients that were accumulated over the ranks; otherwise they stay on
        their rank.
        """
        return nullcontext() if now or distributed.world_size() == 1 else self.network.no_sync()

    def whole(self, value: torch.Tensor) -> torch.Tensor:
        """Return the whole tensor of which a rank may hold a share. All ranks must call this."""
        return value

    def own(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a whole tensor that is spread as ``like`` is."""
        return value

    def alone(self, module: nn.Module) -> nn.Module:
        """Return ``module`` for use outside of the training: whole on every rank, without hooks."""
        return module


class Shares:
    """A share of each parameter on every rank, gathered block by block while it is used.

    The gradients and the optimizer's moments are in shares too. A model that is trained in float32
    takes 16 / ranks bytes a parameter instead of 16, and the memory of one whole block.

    Args:
        model: the model, which is trained.
        others: modules of the same architecture that are spread in the same way, but never called.

    Raises: InputError where torch is too old.
    """

    in_shares = True

    def __init__(
        self, model: nn.Module, *others: nn.Module, device: torch.device, compiled: bool
    ) -> None:
        try:
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor import DTensor, distribute_tensor
        except ImportError:
            raise InputError(f"system.fsdp needs torch 2.6, this is {torch.__version__}") from None
        self._kind, self._distribute = DTensor, distribute_tensor
        self._plain = copy.deepcopy(model).cpu()  # a sharded module cannot be copied
        mesh = torch.distributed.init_device_mesh(device.type, (distributed.world_size(),))
        for module in (model, *others):
            for part in (*_blocks(module), module):
                fully_shard(part, mesh=mesh)
        self._model = model
        self.network = torch.compile(model) if compiled else model

    def averaging(self, now: bool) -> AbstractContextManager:
        self._model.set_requires_gradient_sync(now)
        return nullcontext()

    def whole(self, value: torch.Tensor) -> torch.Tensor:
        return value.full_tensor() if isinstance(value, self._kind) else value

    def own(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if not isinstance(like, self._kind):
            return value
        place = (like.device_mesh, like.placements)
        return self._distribute(value.to(like.device), *place, src_data_rank=None)

    def alone(self, module: nn.Module) -> nn.Module:
        alone = copy.deepcopy(self._plain)
        alone.load_state_dict({n: self.whole(part) for n, part in module.state_dict().items()})
        return alone.to(next(module.parameters()).device)


def spread(
    model: nn.Module,
    average: nn.Module | None,
    *,
    fsdp: bool,
    device: torch.device,
    compiled: bool,
) -> Copies | Shares:
    """Spread ``model``, and its moving average where there is one, over all ranks.

    Raises: InputError when shares are asked for and torch is too old for them.
    """
    if not fsdp or distributed.world_size() == 1:
        return Copies(model, device, compiled)
    others = [average] if average else []
    return Shares(model, *others, device=device, compiled=compiled)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of every stack of layers of one type, the innermost stacks first."""
    for stack in reversed(list(model.modules())):
        if isinstance(stack, nn.ModuleList | nn.Sequential) and len(stack) > 1:
            first, *others = stack
            if all(type(other) is type(first) for other in others) and any(first.children()):
                yield from stack
