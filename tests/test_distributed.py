"""Process groups: the launch environment, the collectives, and ranks that end or hang."""

import os
import re
import signal

import pytest
import torch
import torch.distributed as dist

from ldae import distributed
from ldae.errors import InputError, LostRank


def test_without_a_launcher_there_is_one_rank():
    assert distributed.rank() == 0 and distributed.world_size() == 1 and distributed.is_main()
    tensor = torch.ones(3)
    assert torch.equal(distributed.all_reduce_sum(tensor), torch.ones(3))
    distributed.barrier()
    with distributed.process_group(torch.device("cpu")):
        assert not dist.is_initialized()


def test_device_names():
    assert distributed.device_for("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert distributed.device_for("auto").type == expected
    for wrong in ("gpu", "meta", "cuda:", "cpu:0"):
        with pytest.raises(InputError, match="auto, cpu, cuda or cuda:N"):
            distributed.device_for(wrong)


@pytest.mark.parametrize(
    "error, lost",
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_a_broken_connection_is_a_lost_rank_and_another_error_is_raised_as_it_is(
    error, lost, monkeypatch, tmp_path
):
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    kind = LostRank if lost else RuntimeError
    with pytest.raises(kind, match="rank 0 lost the other ranks" if lost else "shape mismatch"):
        with distributed.process_group(torch.device("cpu")):
            assert distributed.world_size() == 1
            raise error
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
def test_an_incomplete_or_invalid_launch_environment_is_refused(changes, message, monkeypatch):
    complete = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in (complete | {"MASTER_PORT": "29517"} | changes).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        with distributed.process_group(torch.device("cpu")):
            pass


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
