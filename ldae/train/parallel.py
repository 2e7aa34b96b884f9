"""A model in training on several ranks: replicated (DDP) or sharded (FSDP2)."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import MethodType

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldae import distributed
from ldae.errors import InputError
from ldae.settings import ExecutionSettings


class Replicas:
    """The full model on every rank; gradients are averaged over the ranks.

    ``network`` is the module to call.
    """

    sharded = False

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.network = model
        if distributed.world_size() > 1:
            device_ids = [device] if device.type == "cuda" else None
            with warnings.catch_warnings():  # newer torch has another name for the last argument
                warnings.simplefilter("ignore", FutureWarning)
                self.network = DistributedDataParallel(
                    model, device_ids=device_ids, broadcast_buffers=False
                )

    def gradient_sync(self, enabled: bool) -> AbstractContextManager:
        """Return the context of one forward and backward pass.

        If ``enabled``, the gradients accumulated so far are averaged over the ranks. Otherwise they
        stay on their rank.
        """
        return nullcontext() if enabled or distributed.world_size() == 1 else self.network.no_sync()

    def full_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """Gather a tensor that may be sharded. All ranks must call this."""
        return value

    def shard(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a full tensor, sharded as ``like`` is."""
        return value

    def full_module(self, module: nn.Module) -> nn.Module:
        """Return ``module`` for use outside of training: unsharded, without hooks."""
        return module


class Shards:
    """A shard of each parameter on every rank; a block is gathered while it is used.

    The gradients and the optimizer's moments are sharded too. Training in float32 takes
    16 / ranks bytes a parameter instead of 16, plus the memory of one full block. The moving
    average is sharded in the same way, but never called.
    """

    sharded = True

    def __init__(self, model: nn.Module, average: nn.Module | None, device: torch.device) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor, distribute_tensor

        self._dtensor, self._distribute = DTensor, distribute_tensor
        self._unsharded = copy.deepcopy(model).cpu()  # a sharded module cannot be copied
        mesh = torch.distributed.init_device_mesh(device.type, (distributed.world_size(),))
        for module in filter(None, (model, average)):
            for part in (*_blocks(module), module):
                fully_shard(part, mesh=mesh)
        self.network = model

    def gradient_sync(self, enabled: bool) -> AbstractContextManager:
        self.network.set_requires_gradient_sync(enabled)
        return nullcontext()

    def full_tensor(self, value: torch.Tensor) -> torch.Tensor:
        return value.full_tensor() if isinstance(value, self._dtensor) else value

    def shard(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if not isinstance(like, self._dtensor):
            return value
        mesh, placements = like.device_mesh, like.placements
        return self._distribute(value.to(like.device), mesh, placements, src_data_rank=None)

    def full_module(self, module: nn.Module) -> nn.Module:
        full = copy.deepcopy(self._unsharded)
        full.load_state_dict({n: self.full_tensor(part) for n, part in module.state_dict().items()})
        return full.to(next(module.parameters()).device)


def parallelize(
    model: nn.Module,
    average: nn.Module | None,
    system: ExecutionSettings,
    device: torch.device,
    compiled: bool,
) -> Replicas | Shards:
    """Prepare ``model`` and its moving average, if it has one, for training on all ranks.

    Raises: InputError as ``uses_cuda_graphs``.
    """
    if compiled:
        compile_parts(model, system.memory_budget, uses_cuda_graphs(system, device, compiled))
    if not system.fsdp or distributed.world_size() == 1:
        return Replicas(model, device)
    return Shards(model, average, device)


def uses_cuda_graphs(system: ExecutionSettings, device: torch.device, compiled: bool) -> bool:
    """Return whether the compiled parts run as CUDA graphs.

    Raises: InputError with several ranks, because DDP and FSDP move gradients and weights about.
    """
    if not (system.cuda_graphs and compiled and device.type == "cuda"):
        return False
    if distributed.world_size() > 1:
        ranks = distributed.world_size()
        raise InputError(f"system.cuda_graphs works on one GPU, and this run has {ranks} ranks")
    return True


def compile_parts(model: nn.Module, memory_budget: float = 1.0, cuda_graphs: bool = False) -> None:
    """Compile a model in parts, in place; in evaluation mode it runs as it is.

    Each block of a stack is a graph. All blocks of a class and shape share one, so compilation
    takes as long as for one block, and DDP and FSDP communicate between the blocks. Of what the
    model names in ``compiled_parts``, methods are compiled too, and blocks of frozen modules.

    Args:
        memory_budget: the share of a graph's activations to keep for the backward pass, which
            recomputes the cheapest others.
        cuda_graphs: replay each part as a CUDA graph, recorded anew for each block.
    """
    torch._dynamo.config.optimize_ddp = False  # it would cut a block's graph at DDP's buckets
    torch._functorch.config.activation_memory_budget = memory_budget
    # A graph for each shape of a block, and of a micro batch while the largest is searched for: the
    # blocks of a transformer have one shape, those of a U-Net about a dozen.
    torch._dynamo.config.recompile_limit = 64
    for block in _blocks(model):
        if any(parameter.requires_grad for parameter in block.parameters()):
            _compile(block, "forward", cuda_graphs)
    for name in getattr(model, "compiled_parts", ()):
        part = getattr(model, name)
        if isinstance(part, nn.Module):
            for block in _blocks(part):
                _compile(block, "forward", cuda_graphs)
        elif part is not None:
            _compile(model, name, cuda_graphs)


def _compile(module: nn.Module, name: str, cuda_graphs: bool) -> None:
    """Compile a method of a module for training, in which all batches have one size."""
    method = getattr(type(module), name)
    options = {"triton.cudagraphs": True} if cuda_graphs else None
    compiled = torch.compile(method, fullgraph=True, dynamic=False, options=options)

    def call(self: nn.Module, *args: object, **kwargs: object) -> object:
        return (compiled if self.training else method)(self, *args, **kwargs)

    # Bound to the module, so that a copy of the module gets a method of its own.
    setattr(module, name, MethodType(call, module))


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of every stack of layers of one type, the innermost stacks first.

    A stack of a single layer, such as the decoder of a small MAE, counts beside a longer one of the
    same type.
    """
    stacks = [
        stack
        for stack in reversed(list(model.modules()))
        if isinstance(stack, nn.ModuleList | nn.Sequential)
        if len({type(layer) for layer in stack}) == 1 and any(stack[0].children())
    ]
    repeated = {type(stack[0]) for stack in stacks if len(stack) > 1}
    for stack in stacks:
        if type(stack[0]) in repeated:
            yield from stack
