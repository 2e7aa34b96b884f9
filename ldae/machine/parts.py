"""The parts of the machine that bound a run, and their problems."""

import os
from pathlib import Path

import torch

from ldae import trajectory
from ldae.data.workers import SHARED_BYTES, available_cpus
from ldae.files import format_size
from ldae.precision import runs_in_bf16

_SHARED_FOLDER = Path("/dev/shm")


def describe_machine(device: torch.device) -> dict:
    """Return the cores, the shared memory and the memory of the device, in bytes."""
    gpu = device.type == "cuda"
    machine = {
        "cores": available_cpus(),
        "gpus": torch.cuda.device_count() if gpu else 0,
        "fast_bf16": runs_in_bf16("auto", device),
        "memory": torch.cuda.get_device_properties(device).total_memory
        if gpu
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shared": None,
        "shared_free": None,
    }
    if _SHARED_FOLDER.is_dir():
        disk = os.statvfs(_SHARED_FOLDER)
        machine["shared"] = disk.f_frsize * disk.f_blocks
        machine["shared_free"] = disk.f_frsize * disk.f_bavail
    return machine


def find_problems(machine: dict) -> list[str]:
    """Return a sentence for each problem of a machine, with the setting or command that mends it.

    Args:
        machine: as ``describe_machine`` returns it.
    """
    problems = []
    if machine["shared"] is not None and machine["shared_free"] < SHARED_BYTES:
        problems.append(
            f"{_SHARED_FOLDER} has {format_size(machine['shared_free'])} left, and the data "
            f"workers use up to {format_size(SHARED_BYTES)}: start the container with --shm-size "
            "256m, or set --system.workers 0"
        )
    if not machine["fast_bf16"]:
        problems.append(
            "this device has no fast bfloat16 arithmetic, so --system.precision auto computes in "
            "float32: use a GPU of compute capability 8 or newer, or a CPU with AMX or AMD's "
            "AVX-512 BF16"
        )
    cores = max(machine["cores"] // max(machine["gpus"], 1), 1)  # of a process
    workers = trajectory.config("l_dae").system.workers
    if workers > cores:
        problems.append(
            f"the paper's recipe has {workers} data workers a process, and there are {cores} cores "
            f"for them: set --system.workers {cores}"
        )
    return problems
