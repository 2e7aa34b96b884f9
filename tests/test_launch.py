"""--devices: several ranks on this machine act as one command."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch

from ldae import cli, devices, distributed
from ldae import launch as launching
from ldae.errors import LOST_RANK, InputError

PROGRAM = """
import os, sys, time
from pathlib import Path

import torch

from ldae import cli, distributed
from ldae.commands import show
from ldae.errors import InputError

def work(row: str = "", /) -> None:
    with distributed.process_group(torch.device("cpu"), rank_timeout=1):
        rank = distributed.rank()
        distributed.barrier()
{work}

show.show = work
sys.exit(cli.main(["show"]))
"""


def program(work: str) -> tuple[str, str]:
    """Return the arguments of a Python that runs ``work`` in a process group, as a command."""
    return "-c", PROGRAM.format(work=textwrap.indent(work, 8 * " "))


@pytest.fixture
def ranks(monkeypatch, capfd):
    """ranks(work): run code in two ranks; returns the exit status, and what was printed."""

    def run(work: str) -> tuple[int, str, str]:
        monkeypatch.setattr(launching, "_PROGRAM", program(work))
        status = launching.launch([], 2)
        printed, errors = capfd.readouterr()
        # Versions of torch differ in what gloo prints about its connections.
        lines = [line for line in printed.splitlines(True) if not line.startswith("[Gloo]")]
        return status, "".join(lines), errors

    return run


def test_the_ranks_work_together_and_rank_0_prints(ranks):
    assert ranks("print(int(distributed.all_reduce_sum(torch.ones(1))))") == (0, "2\n", "")


def test_wrong_input_is_one_sentence(ranks):
    assert ranks("raise InputError('there are no images')") == (
        2,
        "",
        "ldae: there are no images\n",
    )


def test_wrong_input_of_one_rank_is_one_sentence(ranks):
    status, _, err = ranks(
        "if rank == 1:\n    raise InputError('cat.jpg is truncated')\ndistributed.barrier()"
    )
    lost = "ldae: rank 0 lost the other ranks: rank 1 reported: cat.jpg is truncated\n"
    assert (status, err) == (2, lost)


@pytest.mark.parametrize(
    "rank, start",
    [(1, "rank 0 lost the other ranks: rank 1 was"), (0, "rank 0 of 2 was")],
)
def test_the_death_of_a_rank_is_one_sentence(rank, start, ranks):
    """It is not waited for: the other rank is told which signal killed it."""
    kill = f"if rank == {rank}:\n    os.kill(os.getpid(), 9)\ndistributed.barrier()"
    status, _, err = ranks(kill)
    cause = "killed by SIGKILL, most often because memory ran out"
    assert (status, err) == (LOST_RANK, f"ldae: {start} {cause}\n")


@pytest.mark.parametrize(
    "ends, forwarded, status",
    [
        ([0, 0], set(), 0),
        ([0, -9], set(), LOST_RANK),
        ([LOST_RANK, 2], set(), 2),
        ([-9, 1], set(), 1),
        ([-15, 0], {15}, 143),  # the signal came before the rank could handle it
        ([-15, 0], {2}, LOST_RANK),
    ],
)
def test_the_status_is_that_of_a_rank_that_failed_by_itself(ends, forwarded, status):
    ranks = [SimpleNamespace(returncode=end) for end in ends]
    assert launching._exit_status(ranks, forwarded) == status


def test_an_exception_of_any_rank_is_shown(ranks):
    status, _, err = ranks("if rank == 1:\n    raise TypeError('no key')\ndistributed.barrier()")
    assert status == 1 and "TypeError: no key\n" in err and err.count("Traceback") == 1


def test_a_rank_that_does_not_notice_the_end_of_another_one_is_stopped(ranks, monkeypatch):
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 0.2)
    work = "if rank == 1:\n    raise InputError('cat.jpg is truncated')\ntime.sleep(1e4)"
    assert ranks(work) == (2, "", "ldae: cat.jpg is truncated\n")


def test_the_ranks_stop_when_their_launcher_is_killed(tmp_path):
    work = (
        f"folder = Path({str(tmp_path)!r})\n"
        "(folder / f'begun {rank}').touch()\n"
        "try:\n"
        "    time.sleep(1e4)\n"
        "finally:\n"
        "    (folder / f'ended {rank}').touch()"
    )
    code = f"from ldae import launch; launch._PROGRAM = {program(work)}; launch.launch([], 2)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob("begun *"))) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("ended *"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(list(tmp_path.glob("ended *"))) == 2


def test_a_signal_is_passed_on_to_each_rank_once(ranks, monkeypatch, tmp_path):
    """The first rank that is ready sends the launcher a Ctrl-C."""
    work = (
        "if rank == 0:\n"
        "    time.sleep(0.5)\n"  # so that the other one sleeps too
        f"    os.kill({os.getpid()}, 2)\n"
        "try:\n"
        "    time.sleep(1e4)\n"
        "except KeyboardInterrupt:\n"
        f"    Path({str(tmp_path)!r}, str(rank)).touch()\n"
        "    time.sleep(0.3)\n"  # in which a second one would interrupt
        f"    Path({str(tmp_path)!r}, f'saved {{rank}}').touch()\n"
        "    raise"
    )
    before = signal.getsignal(signal.SIGINT)
    assert ranks(work) == (130, "", "ldae: stopped\n")
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "saved 0", "saved 1"}
    assert signal.getsignal(signal.SIGINT) == before


def test_ranks_share_the_cpus_unless_the_number_of_threads_is_given(monkeypatch):
    monkeypatch.setattr("ldae.data.workers.available_cpus", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def threads(ranks: int) -> str:
        return launching.rank_environment(0, ranks, port=1)["OMP_NUM_THREADS"]

    assert [threads(1), threads(2), threads(16)] == ["9", "4", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads(2) == "3"


def test_each_rank_needs_a_gpu_of_its_own(monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # which device_for sets
    monkeypatch.setenv(distributed.LAUNCHED_RANKS, "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="--devices 4 needs as many GPUs, and torch finds 2 on"):
        devices.device_for("auto")
    assert devices.device_for("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match="--devices 4 needs a GPU for each .* device is cuda:1"):
        devices.device_for("cuda:1")
    assert devices.device_for("auto") == torch.device("cuda:3")


@pytest.mark.parametrize(
    "argv, environment, sentence",
    [
        ("knn pixels --devices 0", {}, "--devices must be a number of ranks of at least 1, not"),
        ("knn pixels --devices=two", {}, "not 'two'"),
        ("knn pixels --devices", {}, "not ''"),
        ("export run out --devices 2", {}, "`ldae export` takes no --devices"),
        ("knn pixels --devices 2", {"RANK": "0"}, "torchrun has started this process"),
        ("knn pixels --devices 2", {"SLURM_STEP_NUM_TASKS": "4"}, "srun has started this process"),
        (
            "knn pixels --devices 2 --slurm.gpus-per-node 4",
            {},
            "--devices 2 contradicts slurm.gpus_per_node 4",
        ),
    ],
)
def test_wrong_numbers_and_contradictions_are_refused(
    argv, environment, sentence, monkeypatch, capsys
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(argv.split()) == 2
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1


def test_one_device_is_this_process(capsys, monkeypatch):
    monkeypatch.setattr("ldae.commands.knn.knn", lambda: print(os.getpid()))
    monkeypatch.setattr("ldae.cli.arguments.GRADERS", {})
    assert cli.main(["knn", "--devices", "1"]) == 0
    assert capsys.readouterr().out == f"{os.getpid()}\n"
