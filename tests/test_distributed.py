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
