"""Process start-up and the few collectives that the rest of the package uses."""

import os
import re
from contextlib import contextmanager
from typing import Iterator

import torch
import torch.distributed as dist

from ldae.errors import InputError

# torchrun sets all of these; a half-set environment is a launcher's mistake that hangs if believed.
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """This process's global rank, 0 when there is only one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 when nothing was launched."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over all ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def device_for(name: str = "auto") -> torch.device:
    """The torch device of this process for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises: InputError for another name, and when a GPU is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {name} was asked for, but torch finds no GPU here")
    if name == "cuda":
        # SLURM and submitit may show each process its own GPU only: then the index is 0.
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return torch.device(name)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that torchrun describes in the environment, if any, and leave it at the end.

    Raises: InputError when only some of torchrun's variables are set.
    """
    missing = [name for name in _LAUNCH_VARIABLES if name not in os.environ]
    if dist.is_initialized() or "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        yield
        return
    if missing:
        raise InputError(
            f"the launch environment is half set: {', '.join(missing)} missing; start with torchrun"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as error:
        if not re.search("gloo|NCCL|connection", str(error), re.IGNORECASE):
            raise
        raise InputError(f"rank {rank()} lost the others, of which one has said why") from error
    finally:
        dist.destroy_process_group()
