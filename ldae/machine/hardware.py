"""The parts of the machine that bound a run, and their problems."""

import os
import time
from contextlib import suppress
from pathlib import Path

import torch

from ldae import trajectory
from ldae.data.workers import SHARED_BYTES, available_cpus
from ldae.files import format_size
from ldae.precision import runs_in_bf16
from ldae.train.compilation import builds_kernels

_SHARED_FOLDER = Path("/dev/shm")
_OWN_GROUP, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_CPU_TIMES = Path("/proc/stat")
_WORK = slice(0, 3)  # the times in user, nice and system mode, before the idle ones
_BUSY = 0.5  # cores of other processes from which on they are a problem


def describe_machine(device: torch.device) -> dict:
    """Return the cores, those that others keep busy, and the memory, shared and of the device.

    The memory is in bytes. Nothing else may run in this process meanwhile.
    """
    gpu = device.type == "cuda"
    machine = {
        "cores": available_cpus(),
        "busy": round(busy_cores(), 2),
        "gpus": torch.cuda.device_count() if gpu else 0,
        "fast_bf16": runs_in_bf16("auto", device),
        "builds_kernels": builds_kernels(),
        "memory": torch.cuda.get_device_properties(device).total_memory
        if gpu
        else memory_of_process(),
        "shared": None,
        "shared_free": None,
    }
    if _SHARED_FOLDER.is_dir():
        disk = os.statvfs(_SHARED_FOLDER)
        machine["shared"] = disk.f_frsize * disk.f_blocks
        machine["shared_free"] = disk.f_frsize * disk.f_bavail
    return machine


def memory_of_process() -> int:
    """Return the bytes of memory that this process may fill: of the machine, or of its container.

    Containers and schedulers such as SLURM set the limit of a control group (version 2) of Linux.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError):
        group = _OWN_GROUP.read_text().rpartition("0::/")[2].strip()
        for folder in (_GROUPS / group, *(_GROUPS / group).parents):
            with suppress(OSError, ValueError):  # no file at the root, and "max" without a limit
                limits.append(int((folder / "memory.max").read_text()))
    return min(limits)


def busy_cores(seconds: float = 0.5) -> float:
    """Return how many of the cores of this process other ones keep busy; 0 where no one knows.

    This process sleeps for so many seconds and counts the time that its cores work.
    """
    before = _cpu_times()
    time.sleep(seconds)
    shares = []
    for old, new in zip(before, _cpu_times()):
        passed = [end - begin for begin, end in zip(old, new)]
        shares.append(sum(passed[_WORK]) / max(sum(passed), 1))
    return sum(shares)


def _cpu_times() -> list[list[int]]:
    """Return for each core of this process the times that Linux counts; elsewhere nothing."""
    if not _CPU_TIMES.exists():
        return []
    own = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in _CPU_TIMES.read_text().splitlines()]
    return [list(map(int, times)) for name, *times in lines if name in own]


def find_other_load(busy: float, cores: int) -> list[str]:
    """Return a sentence when other processes keep ``busy`` of the cores busy, which slow all down.

    Threads of two processes that wait for each other on one core take many times as long.
    """
    if busy <= _BUSY:
        return []
    return [
        f"other processes keep {busy:.1f} of {cores} cores busy, and what is measured beside them "
        "is far too slow: wait for them, or give each process cores of its own with taskset"
    ]


def find_problems(machine: dict) -> list[str]:
    """Return a sentence for each problem of a machine, with the setting or command that mends it.

    Args:
        machine: as ``describe_machine`` returns it.
    """
    problems = find_other_load(machine["busy"], machine["cores"])
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
    if machine["gpus"] and not machine["builds_kernels"]:
        problems.append(
            "there is no C compiler with Python's headers, so --system.compile auto does not "
            "compile, which makes a step slower: install gcc and python3-dev"
        )
    cores = max(machine["cores"] // max(machine["gpus"], 1), 1)  # of a process
    workers = trajectory.config("l_dae").system.workers
    if workers > cores:
        problems.append(
            f"the paper's recipe has {workers} data workers a process, and there are {cores} cores "
            f"for them: set --system.workers {cores}"
        )
    return problems
