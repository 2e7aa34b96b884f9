import os
import re
import signal

import pytest
import torch
import torch.distributed as dist

from ldae import distributed
from ldae.errors import InputError


def test_without_a_launch_there_is_one_rank():
    assert distributed.rank() == 0 and distributed.world_size() == 1 and distributed.is_main()
    tensor = torch.ones(3)
    assert torch.equal(distributed.all_reduce_sum(tensor), torch.ones(3))
    distributed.barrier()
    with distributed.process_group(torch.device("cpu")):
        assert not dist.is_initialized()


def test_devices_go_by_name():
    assert distributed.device_for("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert distributed.device_for("auto").type == expected
    for wrong in ("gpu", "meta", "cuda:", "cpu:0"):
        with pytest.raises(InputError, match="auto, cpu, cuda or cuda:N"):
            distributed.device_for(wrong)


@pytest.mark.parametrize(
    "error, told",
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_a_lost_rank_is_told_and_a_bug_is_not_hidden(error, told, monkeypatch, tmp_path):
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    kind = InputError if told else RuntimeError
    with pytest.raises(kind, match="rank 0 lost the others" if told else "shape mismatch"):
        with distributed.process_group(torch.device("cpu")):
            assert distributed.world_size() == 1
            raise error
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"MASTER_ADDR": None}, "half set: MASTER_ADDR missing"),
        ({"WORLD_SIZE": None, "LOCAL_RANK": ""}, "half set: WORLD_SIZE, LOCAL_RANK missing"),
        ({"RANK": "2"}, "wrong: RANK='2' with WORLD_SIZE 2"),
        ({"MASTER_PORT": "ssh", "RANK": "-1"}, "wrong: RANK='-1', MASTER_PORT='ssh'"),
        ({"MASTER_PORT": "99999"}, "wrong: MASTER_PORT='99999'"),
        ({"RANK": None, "WORLD_SIZE": None}, "half set: RANK, WORLD_SIZE missing"),
    ],
)
def test_a_launch_environment_that_can_not_be_is_refused_by_name(changes, told, monkeypatch):
    whole = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in (whole | {"MASTER_PORT": "29517"} | changes).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=told):
        with distributed.process_group(torch.device("cpu")):
            pass


def test_a_rank_that_hangs_is_named(on_ranks, monkeypatch):
    """Stopped as a whole, as a machine that swaps or a file system that does not answer stops it."""
    monkeypatch.setattr(distributed, "_ROLL_CALL", 0.5)

    def work():
        with distributed.process_group(torch.device("cpu"), rank_timeout=0.08):
            distributed.barrier()
            if distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            distributed.all_reduce_sum(torch.ones(1))

    answers, hangs = on_ranks(work, seconds=1)
    assert re.fullmatch(
        r"LostRank: rank 0 lost the others: rank 1 \(process \d+ on \S+\) has ended, or hangs",
        answers,
    )
    assert hangs is None


def test_the_rank_that_all_met_at_is_not_waited_for(on_ranks, monkeypatch):
    """With its process the words that others left are gone."""
    monkeypatch.setattr(distributed, "_ROLL_CALL", 1e9)

    def work():
        with distributed.process_group(torch.device("cpu")):
            distributed.barrier()
            if distributed.rank() == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            distributed.all_reduce_sum(torch.ones(1))

    _, told = on_ranks(work, seconds=0.1)
    assert re.fullmatch(
        r"LostRank: rank 1 lost the others: the process at 127.0.0.1:\d+, where they met, has ended: "
        "rank 0 or the launcher",
        told,
    )


def test_a_rank_that_ends_leaves_its_reason(on_ranks):
    def work():
        with distributed.process_group(torch.device("cpu")):
            if distributed.rank() == 1:
                raise InputError("image cat.jpg is truncated")
            distributed.all_reduce_sum(torch.ones(1))

    lost, ended = on_ranks(work)
    assert ended == "InputError: image cat.jpg is truncated"
    assert lost == "LostRank: rank 0 lost the others: rank 1 said: image cat.jpg is truncated"
