"""Process start-up, and the few collectives that the package uses."""

import atexit
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ldae.errors import InputError, LostRank, exit_status, first_line, report

# torchrun sets all of these. When a launcher sets only some of them, the start can hang.
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCHED_RANKS = "LDAE_DEVICES"  # the number of ranks, in those that --devices started
_REPORT_SECONDS = 20.0  # time that a rank waits for what the others report
_ABORT_SECONDS = 5.0  # time that a rank which fails takes to abort the process group

_alone = False  # see ``alone``

# Errors of NCCL that this rank causes itself.
_OWN_NCCL_ERRORS = "ncclInvalidArgument|ncclInvalidUsage|ncclUnhandledCudaError"


def rank() -> int:
    """Return the global rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process is rank 0."""
    return rank() == 0


def share_of(count: int) -> range:
    """Return this rank's numbers among 0 .. count - 1: rank, rank + world size, and so on."""
    return range(rank(), count, world_size())


def barrier() -> None:
    """Wait until all ranks have called this function."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def alone() -> Iterator[None]:
    """Let ``all_reduce_sum`` return its argument, so that no rank waits for another one."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over all ranks, in place, and return it."""
    if dist.is_initialized() and not _alone:
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_main(tensor: torch.Tensor) -> torch.Tensor:
    """Return on every rank the finite values that ``tensor`` has on rank 0."""
    return all_reduce_sum((tensor * is_main()).contiguous())  # NCCL takes no other layout


def gather_values(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(topic: str, text: str) -> bool:
    """Return whether all ranks call this function with the same topic and text.

    A rank waits some seconds for the others. It need not know what they do: unlike a collective,
    this disturbs no rank that waits in another collective. Each topic can be used once.
    """
    if not dist.is_initialized():
        return True
    store = dist.PrefixStore("agree", dist.distributed_c10d._get_default_store())
    keys = [f"{topic}/{other}" for other in range(world_size())]
    try:
        store.set(f"{topic}/{rank()}", text)
        store.wait(keys, timedelta(seconds=_REPORT_SECONDS))
        return all(store.get(key).decode() == text for key in keys)
    except RuntimeError:  # a rank is silent, or the process that serves the store has ended
        return False


@contextmanager
def process_group(device: torch.device, rank_timeout: float = 30) -> Iterator[None]:
    """Join the process group that torchrun describes in the environment, and leave it at the end.

    It does nothing without torchrun's variables, or inside another ``process_group``.

    The ranks leave together at the end, and when all of them agree to stop. A rank that fails
    prints its error and does not wait for the others. If it cannot leave within a few seconds, its
    process ends without the interpreter's teardown, which would wait for the others too. The exit
    status is then that of the error.

    Args:
        device: device of this rank; NCCL connects CUDA devices, gloo all others.
        rank_timeout: minutes that the ranks wait for each other.

    Raises: InputError when torchrun's variables are incomplete or invalid. LostRank when a rank
        does not join. LostRank on all other ranks, with the rank named, when one ends or hangs; but
        a rank that waits in NCCL is ended by its watchdog after ``rank_timeout``, without an error.
    """
    if dist.is_initialized() or not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & os.environ.keys():
        yield
        return
    _check_launch()
    timeout = timedelta(minutes=rank_timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # NCCL's watchdog ends the process at a timeout: let it print which ranks are missing.
        os.environ.setdefault("TORCH_NCCL_DESYNC_DEBUG", "1")
    # With a GPU, values on the host are exchanged by gloo, and NCCL connects right away.
    gpu = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    backend = gpu if device.type == "cuda" else {"backend": "gloo"}
    try:
        dist.init_process_group(timeout=timeout, **backend)
    except (RuntimeError, ValueError) as error:
        raise LostRank(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the other "
            f"ranks at {_address()}: {first_line(error)}"
        ) from None
    reports = _Reports()
    stop = None
    with _abort_on_error(reports), _explain_lost_ranks(reports):
        reports.post("process", f"process {os.getpid()} on {platform.node()}")
        try:
            yield
        except Exception as error:
            if exit_status(error) < 128:
                raise
            stop = error  # after a signal: all ranks have agreed to stop
        teardown = _Teardown(dist.destroy_process_group)
        teardown.join(timeout.total_seconds())
        if teardown.is_blocked():
            raise dist.DistError("the other ranks did not leave the process group")
    if stop:
        raise stop


@contextmanager
def _abort_on_error(reports: "_Reports") -> Iterator[None]:
    """Print and post the error of this rank, and abort the process group."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, InputError):
            report(error)
        if not isinstance(error, LostRank):
            reports.post("end", first_line(error) if isinstance(error, Exception) else "stopped")
        _abort(exit_status(error))
        raise


@contextmanager
def _explain_lost_ranks(reports: "_Reports") -> Iterator[None]:
    """Raise LostRank, with the lost ranks named, in place of an error of a broken connection."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        reports.post("end", "")
        raise LostRank(f"rank {rank()} lost the other ranks: {reports.explain_loss()}") from error


def is_lost_connection(error: Exception) -> bool:
    """Return whether a collective raised ``error`` because another rank has ended or hangs."""
    if isinstance(error, dist.DistError):
        return not re.search(_OWN_NCCL_ERRORS, str(error))
    # gloo's errors have no type of their own, but begin with the path of its source file.
    return isinstance(error, RuntimeError) and bool(re.search(r"\bgloo/", str(error)))


class _Teardown(threading.Thread):
    """A thread in which ``leave`` leaves the process group, because this may block for ever."""

    def __init__(self, leave: Callable[[], None]) -> None:
        super().__init__(target=leave, daemon=True)
        self.start()

    def is_blocked(self) -> bool:
        """Return whether this process has not left the process group yet."""
        return self.is_alive() or dist.is_initialized()


def _abort(status: int) -> None:
    """Leave the process group without waiting for the other ranks.

    If this blocks, the process ends with ``status`` when the interpreter comes to its end.
    """
    teardown = _Teardown(dist.distributed_c10d._abort_process_group)
    with suppress(KeyboardInterrupt):  # the error stands, whoever stops this process meanwhile
        teardown.join(_ABORT_SECONDS)

    def end() -> None:
        if teardown.is_blocked():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    if teardown.is_blocked():
        atexit.register(end)


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _check_launch() -> None:
    """Check torchrun's variables. Raises: InputError when they are incomplete or invalid."""
    missing = [name for name in _LAUNCH_VARIABLES if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"the launch environment is incomplete, missing {', '.join(missing)}; "
            "start with --devices or torchrun"
        )
    numbers = [name for name in _LAUNCH_VARIABLES if name != "MASTER_ADDR"]
    invalid = [name for name in numbers if not os.environ[name].isdecimal()]
    if not invalid and int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        invalid = ["RANK"]
    if not invalid and not 0 < int(os.environ["MASTER_PORT"]) < 65536:
        invalid = ["MASTER_PORT"]
    if invalid:
        values = ", ".join(f"{name}={os.environ[name]!r}" for name in invalid)
        size = os.environ["WORLD_SIZE"]
        raise InputError(f"the launch environment is invalid: {values} with WORLD_SIZE {size}")


def reports_in(store: dist.Store) -> dist.Store:
    """Return the part of a process group's store for reports about ranks.

    It is the same part with and without the prefixes that torch adds for a process group.
    """
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return dist.PrefixStore("ldae", store)


class _Reports:
    """Reports about the ranks, in the key-value store of the process group.

    A rank posts its process and, when it fails, the reason. --devices posts which signal killed a
    rank. Posting and reading wait for no other rank. A report is lost when the process that serves
    the store has ended.
    """

    def __init__(self) -> None:
        self.store = reports_in(dist.distributed_c10d._get_default_store())

    def post(self, topic: str, text: str) -> None:
        """Publish this rank's report on a topic."""
        with suppress(RuntimeError):
            self.store.set(f"{topic}/{rank()}", text)

    def _read(self, topic: str, other: int) -> str | None:
        """Return what rank ``other`` posted, if anything.

        Raises: RuntimeError when the process that serves the store has ended.
        """
        if not self.store.check([f"{topic}/{other}"]):
            return None
        return self.store.get(f"{topic}/{other}").decode()

    def explain_loss(self) -> str:
        """Return why other ranks failed or were killed, or else the names of the silent ranks."""
        try:
            return self._explain_loss()
        except RuntimeError:
            return f"rank 0 or the launcher has ended, and with it the store at {_address()}"

    def _explain_loss(self) -> str:
        until = time.monotonic() + _REPORT_SECONDS
        others = [other for other in range(world_size()) if other != rank()]
        while True:
            ends = {other: self._read("end", other) for other in others}
            silent = [other for other, end in ends.items() if end is None]
            # A rank that lost the others itself posts an empty reason.
            reasons = [f"rank {other} reported: {end}" for other, end in ends.items() if end]
            for other in silent:
                if killed := self._read("killed", other):
                    reasons.append(f"rank {other} was killed by {killed}")
            if reasons:
                return "; ".join(reasons)
            if not silent:
                return "the connection between them broke"
            if time.monotonic() > until:
                break
            time.sleep(0.2)
        names = [f"rank {other} ({self._read('process', other) or 'unknown'})" for other in silent]
        end = "has ended or hangs" if len(names) == 1 else "have ended or hang"
        return f"{' and '.join(names)} {end}"
