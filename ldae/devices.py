"""The device of a process: a CPU, or the GPU of its rank."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ldae.distributed import LAUNCHED_RANKS
from ldae.errors import InputError


def device_for(name: str | torch.device = "auto") -> torch.device:
    """Return the torch device of this process for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    ``cuda`` is the GPU with the number of the local rank. Before a GPU is first used, this sets
    variables that are not set yet: for an allocator that wastes little memory on varying sizes, and
    for a cuBLAS that can be deterministic.

    Raises: InputError for another name, for a GPU when there is none, and when there are fewer GPUs
        than ranks of --devices.
    """
    name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {name} was asked for, but torch finds no GPU on this machine")
    if name.startswith("cuda"):
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        _check_gpu_of_each_rank(name)
    if name == "cuda":
        # SLURM and submitit may show each process only its own GPU, which then has the index 0.
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return torch.device(name)


@contextmanager
def report_low_memory(device: torch.device, at_once: str, setting: str) -> Iterator[None]:
    """Turn a lack of memory into an InputError that names the setting to lower."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(
            f"{device} has too little memory for {at_once} at a time: lower {setting}"
        ) from None


def _check_gpu_of_each_rank(name: str) -> None:
    """Check that each rank of --devices, which sees all GPUs of the machine, has one of its own.

    Raises: InputError when there are too few, and for a device that names one of them.
    """
    ranks, gpus = int(os.environ.get(LAUNCHED_RANKS, 1)), torch.cuda.device_count()
    if ranks > gpus:
        raise InputError(
            f"--devices {ranks} needs as many GPUs, and torch finds {gpus} on this machine; device "
            "cpu runs the ranks without GPUs"
        )
    if ranks > 1 and name != "cuda":
        raise InputError(f"--devices {ranks} needs a GPU for each rank, and device is {name}")
