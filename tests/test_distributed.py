"""Process groups: the launch environment, the collectives, and ranks that end or hang."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from ldae import devices, distributed
from ldae.errors import LOST_RANK, InputError, LostRank
from ldae.train.interrupt import Interrupted


def test_without_a_launcher_there_is_one_rank():
    assert distributed.rank() == 0 and distributed.world_size() == 1 and distributed.is_main()
    tensor = torch.ones(3)
    assert torch.equal(distributed.all_reduce_sum(tensor), torch.ones(3))
    distributed.barrier()
    with distributed.process_group(torch.device("cpu")):
        assert not dist.is_initialized()


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_the_ranks_share_all_numbers_and_none_twice(ranks, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    for count in (0, 1, 4, 13):
        shares = []
        for number in range(ranks):
            monkeypatch.setattr(distributed, "rank", lambda: number)
            shares.append(list(distributed.share_of(count)))
        assert sorted(sum(shares, [])) == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert all(part % ranks == number for number, share in enumerate(shares) for part in share)


def test_device_names():
    assert devices.device_for("cpu") == torch.device("cpu")
    assert devices.device_for(torch.device("cpu")) == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert devices.device_for("auto").type == expected
    for wrong in ("gpu", "meta", "cuda:", "cpu:0"):
        with pytest.raises(InputError, match="auto, cpu, cuda or cuda:N"):
            devices.device_for(wrong)


@pytest.mark.parametrize(
    "error, lost",
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer"), True),
        (RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting"), True),
        (dist.DistBackendError("NCCL error in: x.cpp:1\nncclRemoteError: A call failed"), True),
        (dist.DistNetworkError("Connection reset by peer"), True),
        (dist.DistBackendError("ncclInvalidUsage: Duplicate GPU detected"), False),
        (dist.DistBackendError("ncclUnhandledCudaError: 'out of memory'"), False),
        (RuntimeError("shape mismatch"), False),
        (RuntimeError("the shape is unknown at runtime"), False),
        (RuntimeError("the connection to the hub timed out"), False),
    ],
)
def test_a_broken_connection_is_a_lost_rank_and_another_error_is_raised_as_it_is(
    error, lost, launch
):
    launch()
    with pytest.raises(LostRank if lost else type(error)) as caught:
        with distributed.process_group(torch.device("cpu")):
            assert distributed.world_size() == 1
            raise error
    assert (caught.value is error) == (not lost)
    assert not lost or str(caught.value).startswith("rank 0 lost the other ranks")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"MASTER_ADDR": None}, "incomplete, missing MASTER_ADDR;"),
        ({"WORLD_SIZE": None, "LOCAL_RANK": ""}, "incomplete, missing WORLD_SIZE, LOCAL_RANK;"),
        ({"RANK": "2"}, "invalid: RANK='2' with WORLD_SIZE 2"),
        ({"MASTER_PORT": "ssh", "RANK": "-1"}, "invalid: RANK='-1', MASTER_PORT='ssh'"),
        ({"MASTER_PORT": "99999"}, "invalid: MASTER_PORT='99999'"),
        ({"RANK": None, "WORLD_SIZE": None}, "incomplete, missing RANK, WORLD_SIZE;"),
    ],
)
def test_an_incomplete_or_invalid_launch_environment_is_refused(changes, message, launch):
    launch(**({"WORLD_SIZE": "2"} | changes))
    with pytest.raises(InputError, match=message):
        with distributed.process_group(torch.device("cpu")):
            pass


BLOCKED = """
import atexit, sys, threading
import torch
import torch.distributed as dist

from ldae import cli, distributed
from ldae.cluster.send import Job
from ldae.commands import show
from ldae.errors import InputError
from ldae.train.interrupt import Interrupted

def block():
    threading.Event().wait()

dist.destroy_process_group = dist.distributed_c10d._abort_process_group = block
atexit.register(block)  # the group would also block the end of the interpreter
distributed._ABORT_SECONDS = 0.1

def work(row: str = "", /) -> None:
    with distributed.process_group(torch.device("cpu"), rank_timeout=0.01):
        {work}

show.show = work
if {is_job}:
    Job(("show",), ".", {folder!r})()
sys.exit(cli.main(["show"]))
"""


@pytest.mark.parametrize(
    "is_job, work, status, message",
    [
        (False, "raise InputError('cat.jpg is bad')", 2, "ldae: cat.jpg is bad\n"),
        (True, "raise InputError('cat.jpg is bad')", 2, "ldae: cat.jpg is bad\n"),
        (False, "raise TypeError('no such key')", 1, "TypeError: no such key\n"),
        (True, "raise RuntimeError('gloo/x.cc: closed')", LOST_RANK, "ldae: rank 0 lost the other"),
        (False, "pass", LOST_RANK, "ldae: rank 0 lost the other ranks"),
        (False, "raise Interrupted(15, 'saved')", LOST_RANK, "ldae: rank 0 lost the other ranks"),
    ],
)
def test_a_teardown_that_blocks_delays_neither_the_error_nor_the_end_of_the_process(
    is_job, work, status, message, launch, tmp_path, monkeypatch
):
    launch()
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    task = {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "sln1"}
    for name, value in (task | {"SLURM_JOB_ID": "7", "SUBMITIT_EXECUTOR": "slurm"}).items():
        monkeypatch.setenv(name, value)
    code = BLOCKED.format(is_job=is_job, work=work, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done
    assert done.stderr.count(message) == 1, done
    if is_job:
        assert (tmp_path / "7" / "0.status").read_text() == str(status)


def test_ranks_that_agree_to_stop_leave_together(launch, monkeypatch):
    launch()
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", None)
    with pytest.raises(Interrupted):
        with distributed.process_group(torch.device("cpu")):
            raise Interrupted(signal.SIGTERM, "it is saved")
    assert not dist.is_initialized()


def test_a_signal_during_the_abort_does_not_replace_the_error(on_ranks, monkeypatch):
    abort = dist.distributed_c10d._abort_process_group

    def stopped() -> None:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        abort()

    def work() -> None:
        with distributed.process_group(torch.device("cpu")):
            raise InputError("image cat.jpg is truncated")

    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", stopped)
    assert on_ranks(work, ranks=1) == ["InputError: image cat.jpg is truncated"]


def test_a_rank_that_fails_does_not_wait_for_the_collective_that_it_has_begun(
    on_ranks, monkeypatch
):
    monkeypatch.setattr(distributed, "_ABORT_SECONDS", 0.1)

    def work():
        with distributed.process_group(torch.device("cpu")):
            distributed.barrier()
            if distributed.rank() == 0:
                time.sleep(1e4)
            begun = dist.all_reduce(torch.ones(1), async_op=True)
            raise InputError(f"image cat.jpg is truncated, {begun.is_completed()}")

    assert on_ranks(work, seconds=1) == [None, "InputError: image cat.jpg is truncated, False"]


def test_a_rank_that_hangs_is_named(on_ranks, monkeypatch):
    """SIGSTOP stands for a machine that swaps, or for a file system that does not answer."""
    monkeypatch.setattr(distributed, "_REPORT_SECONDS", 0.5)

    def work():
        with distributed.process_group(torch.device("cpu"), rank_timeout=0.08):
            distributed.barrier()
            if distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            distributed.all_reduce_sum(torch.ones(1))

    error, hanging = on_ranks(work, seconds=1)
    assert re.fullmatch(
        r"LostRank: rank 0 lost the other ranks: rank 1 \(process \d+ on \S+\) has ended or hangs",
        error,
    )
    assert hanging is None


def test_the_end_of_the_rank_that_serves_the_store_is_reported_at_once(on_ranks, monkeypatch):
    """The reports of the other ranks are lost with it."""
    monkeypatch.setattr(distributed, "_REPORT_SECONDS", 1e9)

    def work():
        with distributed.process_group(torch.device("cpu")):
            distributed.barrier()
            if distributed.rank() == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            distributed.all_reduce_sum(torch.ones(1))

    _, error = on_ranks(work, seconds=0.1)
    assert re.fullmatch(
        "LostRank: rank 1 lost the other ranks: rank 0 or the launcher has ended, and with it the "
        r"store at 127.0.0.1:\d+",
        error,
    )


def test_an_error_of_one_rank_is_named_by_the_others(on_ranks):
    def work():
        with distributed.process_group(torch.device("cpu")):
            if distributed.rank() == 1:
                raise InputError("image cat.jpg is truncated")
            distributed.all_reduce_sum(torch.ones(1))

    lost, ended = on_ranks(work)
    assert ended == "InputError: image cat.jpg is truncated"
    assert (
        lost == "LostRank: rank 0 lost the other ranks: rank 1 reported: image cat.jpg is truncated"
    )


@pytest.mark.parametrize("texts, agreed", [("aa", True), ("ab", False), ("a", False)])
def test_ranks_agree_when_all_of_them_say_the_same(texts, agreed, on_ranks, monkeypatch):
    """A silent rank may wait in a collective meanwhile, which is not disturbed."""
    monkeypatch.setattr(distributed, "_REPORT_SECONDS", 1.0)

    def work():
        with distributed.process_group(torch.device("cpu")):
            if distributed.rank() < len(texts):
                assert distributed.agree("topic", texts[distributed.rank()]) == agreed
            assert distributed.all_reduce_sum(torch.ones(1)) == 2

    assert on_ranks(work) == ["", ""]


def test_all_ranks_get_the_values_of_the_first_in_the_layout_that_nccl_takes(on_ranks):
    def work():
        with distributed.process_group(torch.device("cpu")):
            ours = (torch.arange(6.0) + 10 * distributed.rank()).view(2, 3).T
            of_first = distributed.broadcast_from_main(ours)
            assert of_first.is_contiguous() and not ours.is_contiguous()
            assert of_first.tolist() == [[0, 3], [1, 4], [2, 5]]

    assert on_ranks(work) == ["", ""]


def test_one_rank_agrees_with_itself():
    assert distributed.agree("topic", "text")
