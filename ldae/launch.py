"""Start a command again in several ranks on this machine: the flag --devices."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from ldae.errors import LOST_RANK, InputError
from ldae.train.interrupt import stop_signals

FLAG = "--devices"
HELP = (
    f"`ldae COMMAND ... {FLAG} N` trains or evaluates in N processes on this machine, each on its "
    "own GPU if there are any."
)

_HOST = "127.0.0.1"
_PROGRAM = ("-m", "ldae")
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 60.0  # in which the other ranks can end by themselves after one has failed
_SHOWN_BYTES = 65536  # of the end of what a rank printed to stderr


def split_devices(argv: Sequence[str]) -> tuple[list[str], int]:
    """Split a command line into the command and the number of --devices, which is 0 if not given.

    Raises: InputError when the number is not a whole number of at least 1.
    """
    command: list[str] = []
    devices = 0
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != FLAG:
            command.append(word)
            continue
        value = value if equals else next(words, "")
        if not re.fullmatch(r"[1-9]\d{0,5}", value):
            raise InputError(f"{FLAG} must be a number of ranks of at least 1, not {value!r}")
        devices = int(value)
    return command, devices


def check_unlaunched(devices: int) -> None:
    """Check that this process is not one of several ranks itself.

    Raises: InputError when torchrun, or srun with several tasks, has started it.
    """
    starter = ""
    if {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & os.environ.keys():
        starter = "torchrun"
    elif os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":  # not set in a batch script
        starter = "srun"
    if starter:
        raise InputError(
            f"{FLAG} {devices} starts the ranks by itself, but {starter} has started this process "
            f"as one of its ranks: leave out either {FLAG} or {starter}"
        )


def launch(argv: Sequence[str], devices: int) -> int:
    """Run ``ldae ARGV`` in ``devices`` ranks on this machine, and return the exit status.

    The ranks have the environment that torchrun would set, and meet at a store in this process. If
    OMP_NUM_THREADS is not set, they share the CPUs equally. Signals are passed on to each rank, so
    that the command stops, saves and ends as in one process. The status is that of the first rank
    that failed by itself, and ``LOST_RANK`` when a rank was killed.

    The output of rank 0 is that of the command. What another rank printed to stderr is shown only
    when rank 0 cannot explain the end of the command.

    torch's own launcher kills a rank that has not saved 30 s after a signal (the time is fixed
    before torch 2.12), turns every status into 1, and prints a report of its own.
    """
    import torch.distributed as dist

    from ldae.distributed import reports_in

    store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    with ExitStack() as stack:
        received = stack.enter_context(_received_signals())
        outputs = [stack.enter_context(TemporaryFile()) for _ in range(devices)]
        ranks = []
        for number, output in enumerate(outputs):
            environment = os.environ | rank_environment(number, devices, store.port)
            rank = _start(argv, environment, output if number else None)
            ranks.append(stack.enter_context(rank))
            stack.callback(rank.kill)  # if this process fails; none of them runs otherwise
        failed, forwarded = _wait(ranks, received, reports_in(store))
        _explain(ranks, failed, forwarded, outputs)
        return _exit_status(ranks, forwarded)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would set for one of the ranks on this machine."""
    from ldae.data.workers import available_cpus
    from ldae.distributed import LAUNCHED_RANKS

    threads = max(available_cpus() // ranks, 1)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        # The store is served by this process, and not by rank 0.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        LAUNCHED_RANKS: str(ranks),
        # The same code and packages as here, whatever lies in the current folder.
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


def stop_with_launcher() -> None:
    """Let a rank that ``launch`` has started stop, as after SIGTERM, when the launcher is gone.

    The launcher holds the other end of the rank's standard input, and never writes to it.
    """
    if "RANK" not in os.environ:
        return
    from ldae.distributed import LAUNCHED_RANKS  # imports torch

    if LAUNCHED_RANKS not in os.environ:  # torchrun has started this rank
        return

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _start(
    argv: Sequence[str], environment: dict[str, str], stderr: BinaryIO | None
) -> subprocess.Popen:
    """Start a rank; one with a file for ``stderr`` prints nothing to the terminal."""
    return subprocess.Popen(
        [sys.executable, "-P", *_PROGRAM, *argv],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL if stderr else None,
        stderr=stderr,
        process_group=0,  # a Ctrl-C of the terminal reaches the ranks once, from this process
    )


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """Collect the numbers of stop signals in a list, instead of stopping this process."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in stop_signals()
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(
    ranks: list[subprocess.Popen], received: list[int], reports: Any
) -> tuple[list[int], set[int]]:
    """Wait for the end of all ranks, and pass signals on to them.

    A rank that was killed is reported to the others. When a rank has failed, and after a second
    Ctrl-C, the others have a minute to end by themselves: they may wait in a collective.

    Returns: the ranks that failed, in the order of their ends; and the signals that were passed on.
    """
    failed: list[int] = []
    forwarded: set[int] = set()
    until = math.inf
    while True:
        running = [rank for rank in ranks if rank.poll() is None]
        for number, rank in enumerate(ranks):
            if not rank.returncode or number in failed:
                continue
            failed.append(number)
            if rank.returncode < 128:  # else it stopped after a signal, and rank 0 may be saving
                until = min(until, time.monotonic() + _GRACE_SECONDS)
            if rank.returncode < 0:
                reports.set(f"killed/{number}", _killed_by(rank))
        if not running:
            return failed, forwarded
        while received:
            number = received.pop(0)
            if number == signal.SIGINT and number in forwarded:
                until = min(until, time.monotonic() + _GRACE_SECONDS)
            forwarded.add(number)
            for rank in running:
                rank.send_signal(number)
        if time.monotonic() > until:
            for rank in running:
                rank.kill()
        time.sleep(_POLL_SECONDS)


def _killed_by(rank: subprocess.Popen) -> str:
    """Return the signal that killed a rank, and its most frequent cause."""
    name = signal.Signals(-rank.returncode).name
    return f"{name}, most often because memory ran out" if name == "SIGKILL" else name


def _explain(
    ranks: list[subprocess.Popen],
    failed: list[int],
    forwarded: set[int],
    outputs: Sequence[BinaryIO],
) -> None:
    """Print why the command failed, unless rank 0 has done so."""
    status = ranks[0].returncode
    shown = [number for number in failed[:1] if status <= 0]
    # Rank 0 can only name an exception in another rank: its traceback is shown too.
    shown = shown or [n for n in failed if status == LOST_RANK and ranks[n].returncode == 1][:1]
    for number in shown:
        if ranks[number].returncode >= 0:
            sys.stderr.write(_tail(outputs[number]))
        elif -ranks[number].returncode not in forwarded:
            name = f"rank {number} of {len(ranks)}"
            print(f"ldae: {name} was killed by {_killed_by(ranks[number])}", file=sys.stderr)


def _tail(output: BinaryIO) -> str:
    """Return the end of what a rank has printed to stderr."""
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _SHOWN_BYTES))
    return output.read().decode(errors="replace")


def _exit_status(ranks: list[subprocess.Popen], forwarded: set[int]) -> int:
    """Return the exit status of the command; a lost rank counts less than any other failure."""
    statuses = []
    for rank in ranks:
        status = rank.returncode
        if status < 0:
            status = 128 - status if -status in forwarded else LOST_RANK
        statuses.append(status)
    return min(filter(None, statuses), key=lambda status: status == LOST_RANK, default=0)
