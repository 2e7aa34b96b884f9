"""Process start-up and the few collectives that the rest of the package uses."""

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from ldae.errors import InputError, LostRank, first_line

# torchrun sets all of these; a half-set environment is a launcher's mistake that hangs if believed.
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_ROLL_CALL = 20.0  # seconds for ranks that have lost each other to say so


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


def gather_values(value: int) -> list[int]:
    """The value of each rank."""
    if not dist.is_initialized():
        return [value]
    values = [0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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
def process_group(device: torch.device, rank_timeout: float = 30) -> Iterator[None]:
    """Join the group that torchrun describes in the environment, if any, and leave it at the end.

    Ranks wait ``rank_timeout`` minutes for each other.

    Raises: InputError when torchrun's variables are set by half or are no ranks; LostRank when a rank
        does not come to the start, and on every other rank, naming it, when one has ended or hangs.
    """
    if dist.is_initialized() or not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & os.environ.keys():
        yield
        return
    _check_launch()
    timeout = timedelta(minutes=rank_timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # There the watchdog of NCCL ends the process: let it tell which ranks are missing.
        os.environ.setdefault("TORCH_NCCL_DESYNC_DEBUG", "1")
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise LostRank(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {first_line(error)}"
        ) from None
    words = _Words()
    try:
        words.leave("here", f"process {os.getpid()} on {platform.node()}")
        yield
    except InputError as error:
        words.leave("end", str(error))
        raise
    except RuntimeError as error:
        if not re.search("gloo|NCCL|connection|time", str(error), re.IGNORECASE):
            words.leave("end", first_line(error))
            raise
        words.leave("end", "")
        raise LostRank(f"rank {rank()} lost the others: {words.missing()}") from error
    finally:
        dist.destroy_process_group()


def _check_launch() -> None:
    """Raises: InputError when what the launcher says can not be."""
    missing = [name for name in _LAUNCH_VARIABLES if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"the launch environment is half set: {', '.join(missing)} missing; start with torchrun"
        )
    numbers = [name for name in _LAUNCH_VARIABLES if name != "MASTER_ADDR"]
    wrong = [name for name in numbers if not os.environ[name].isdecimal()]
    if not wrong and int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        wrong = ["RANK"]
    if not wrong and not 0 < int(os.environ["MASTER_PORT"]) < 65536:
        wrong = ["MASTER_PORT"]
    if wrong:
        told = ", ".join(f"{name}={os.environ[name]!r}" for name in wrong)
        size = os.environ["WORLD_SIZE"]
        raise InputError(f"the launch environment is wrong: {told} with WORLD_SIZE {size}")


class _Words:
    """What ranks leave for the others, in the store that they met in: it needs none of them to wait.

    Where the store's own process has ended, a word that can not be left is none.
    """

    def __init__(self) -> None:
        self.store = dist.PrefixStore("ldae", dist.distributed_c10d._get_default_store())

    def leave(self, what: str, word: str) -> None:
        with suppress(RuntimeError):
            self.store.set(f"{what}/{rank()}", word)

    def _read(self, what: str, of: int) -> str | None:
        """Raises: RuntimeError when the store's process has ended."""
        if not self.store.check([f"{what}/{of}"]):
            return None
        return self.store.get(f"{what}/{of}").decode()

    def missing(self) -> str:
        """Who has ended and why, or who does not answer while all others have lost each other."""
        try:
            return self._missing()
        except RuntimeError:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            return f"the process at {place}, where they met, has ended: rank 0 or the launcher"

    def _missing(self) -> str:
        until = time.monotonic() + _ROLL_CALL
        others = [other for other in range(world_size()) if other != rank()]
        while True:
            ends = {other: self._read("end", other) for other in others}
            silent = [other for other, end in ends.items() if end is None]
            reasons = [f"rank {other} said: {end}" for other, end in ends.items() if end]
            if reasons:
                return "; ".join(reasons)
            if not silent or time.monotonic() > until:
                break
            time.sleep(0.2)
        names = [f"rank {other} ({self._read('here', other) or 'unknown'})" for other in silent]
        if not names:
            return "the connection between them broke"
        return f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'} ended, or hangs"
