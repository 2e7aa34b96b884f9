"""Replicated, sharded or on one rank: the same training, with interchangeable checkpoints."""

import functools
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ldae import distributed
from ldae.data.workers import Batch
from ldae.errors import InputError
from ldae.runs.checkpoints import Checkpoints
from ldae.settings import OptimSettings, SystemSettings
from ldae.train import loop, parallel
from ldae.train.loop import Hook, Loop
from ldae.train.optim import adamw
from ldae.train.plan import Plan
from ldae.train.state import State

CPU = torch.device("cpu")
OPTIM = OptimSettings(
    batch_size=8, blr=1.0, warmup_epochs=0.5, clip_grad=0.5, ema=0.7, weight_decay=0.1
)
STEPS, HALF = 6, 24


class Stack(nn.Module):
    """A network of blocks, with a layer outside of them, a frozen layer and a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.frozen = nn.Linear(3, 5).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(5, 1)
        self.register_buffer("level", torch.zeros(1))

    def forward(self, images, positions, labels):
        self.level += 1
        x = self.frozen(images)
        for block in self.blocks:
            x = x + block(x)
        return (self.head(x)[:, 0] - labels).square().mean()


def stream(start, micro_batches, bad_at=None):
    """Yield this rank's micro batches; those of the last rank are bad from ``bad_at`` on."""
    rank, world = distributed.rank(), distributed.world_size()
    size = 8 // world // micro_batches
    for n in range(start, 8 * STEPS, 8):
        for micro in range(micro_batches):
            first = n + (micro * world + rank) * size
            if bad_at is not None and first >= bad_at and rank == world - 1:
                raise InputError("image cat.jpg is truncated")
            positions = torch.arange(first, first + size)
            images = torch.stack([torch.sin(positions * k / 7) for k in (1.0, 2.0, 3.0)], 1)
            yield Batch(images, images.sum(1) ** 2, positions, [])


class Centred(Stack):
    """Subtracts a running mean, updated by the micro batches of all ranks in order."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.means = []

    def forward(self, images, positions, labels):
        self.means.append(images.mean(0))
        return super().forward(images - self.mean, positions, labels)

    def after_step(self):
        means = torch.zeros(len(self.means), distributed.world_size(), 3)
        means[:, distributed.rank()] = torch.stack(self.means)
        for mean in distributed.all_reduce_sum(means).flatten(0, 1):
            self.mean.lerp_(mean, 0.1)
        self.means.clear()


def momentum(model, optim):
    trained = [part for part in model.parameters() if part.requires_grad]
    return torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=optim.weight_decay)


def run(
    folder, fsdp=False, micro_batches=1, model=Stack, optimizer=adamw, bad_at=None, save_minutes=0
):
    """Train to the end from the newest checkpoint; all checkpoints are kept."""
    seen = []

    def call(model):
        seen.append(model.head.weight.sum().item())
        return {"w": seen[-1]}

    hook = Hook(8, call, weights="both")
    with distributed.process_group(CPU, rank_timeout=1):
        trained = Loop(
            model(),
            functools.partial(stream, bad_at=bad_at),
            Plan(epoch=16, total=8 * STEPS, batch_size=8, micro_batches=micro_batches),
            OPTIM,
            SystemSettings(log_every=1, save_minutes=save_minutes, fsdp=fsdp),
            device=CPU,
            checkpoints=Checkpoints(folder),
            open_metrics=lambda seen: SimpleNamespace(write=print, close=lambda: None),
            describe={},
            hooks=(hook,),
            optimizer=optimizer,
        ).train()
        assert type(trained) is model and type(trained.head.weight) is nn.Parameter
        distributed.barrier()  # rank 0 has saved
        last = Checkpoints(folder).load()
        assert torch.equal(trained.head.weight, last["average"]["head.weight"])
        parts = [last[part]["head.weight"].sum().item() for part in ("average", "model")]
        assert seen[-2:] == parts and len(set(parts)) == 2


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-rank")
    run(folder)
    return folder


def assert_close(folder, other):
    one, two = (Checkpoints(path).load() for path in (folder, other))
    assert one["images_seen"] == two["images_seen"] == 8 * STEPS
    for part in ("model", "average"):
        assert one[part].keys() == two[part].keys()
    for state in (one, two):
        for part in ("model", "average"):
            del state[part]["level"]  # counts the forward passes
    for part in ("model", "average", "optimizer"):
        torch.testing.assert_close(two[part], one[part], rtol=1e-4, atol=1e-6, msg=part)


def half(folder, to):
    """Copy a run and delete its checkpoints after the first half."""
    shutil.copytree(folder, to)
    for path in Checkpoints(to).paths():
        if path.name > f"images-{HALF:012}.pt":
            path.unlink()
    return to


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_ranks_equal_one_and_resume_each_other(fsdp, one_rank, on_ranks, tmp_path):
    both = tmp_path / "both"
    assert on_ranks(lambda: run(both, fsdp, micro_batches=2)) == ["", ""]
    assert_close(one_rank, both)
    one = half(both, tmp_path / "two then one")
    run(one)
    assert_close(one_rank, one)
    two = half(one_rank, tmp_path / "one then two")
    assert on_ranks(lambda: run(two, fsdp)) == ["", ""]
    assert_close(one_rank, two)


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_ranks_equal_one_with_buffers_and_another_optimizer(fsdp, on_ranks, tmp_path):
    how = {"model": Centred, "optimizer": momentum}
    run(tmp_path / "one", micro_batches=4, **how)
    both = tmp_path / "both"
    assert on_ranks(lambda: run(both, fsdp, micro_batches=2, **how)) == ["", ""]
    one, two = (Checkpoints(path).load()["model"]["mean"] for path in (tmp_path / "one", both))
    assert torch.equal(one, two) and one.abs().min() > 0.01
    assert_close(tmp_path / "one", both)
    again = half(both, tmp_path / "again")
    assert on_ranks(lambda: run(again, fsdp, micro_batches=2, **how)) == ["", ""]
    whole, parts = (Checkpoints(path).load() for path in (both, again))
    for part in ("model", "average"):
        assert all(torch.equal(whole[part][name], parts[part][name]) for name in whole[part])


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("fsdp", [False, True])
def test_bad_data_on_one_rank_stop_all_ranks_after_a_checkpoint(
    fsdp, lag, on_ranks, tmp_path, monkeypatch
):
    """The bad image is in the second micro batch of step 5. With a lag, reports are read late, as
    on a GPU. Once the image is mended, the run equals an undisturbed one bit for bit."""
    monkeypatch.setattr(loop, "report_lag", lambda device: lag)
    folder, whole = tmp_path / "run", tmp_path / "whole"
    how = {"fsdp": fsdp, "micro_batches": 2, "save_minutes": 10}
    errors = on_ranks(lambda: run(folder, **how, bad_at=36))
    sentence = "image cat.jpg is truncated"
    assert errors == [f"InputError: rank 1 reported: {sentence}", f"InputError: {sentence}"]
    assert Checkpoints(folder).load()["images_seen"] == 32
    for path in (folder, whole):
        assert on_ranks(lambda: run(path, **how)) == ["", ""]
    one, two = (Checkpoints(path).load() for path in (whole, folder))
    for part in ("model", "average"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])


@pytest.mark.parametrize("lag", [0, 1])
def test_bad_data_in_the_first_step_stop_all_ranks(lag, on_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "report_lag", lambda device: lag)
    errors = on_ranks(lambda: run(tmp_path, bad_at=0))
    assert [error and error[-26:] for error in errors] == ["image cat.jpg is truncated"] * 2
    assert Checkpoints(tmp_path).paths() == []


def test_fsdp_on_one_rank_changes_nothing(one_rank, tmp_path):
    run(tmp_path, fsdp=True)
    assert_close(one_rank, tmp_path)


def test_shards_are_parts_of_parameters_and_gradients(on_ranks):
    """Gradients are reduced once a step."""

    def work():
        with distributed.process_group(CPU, rank_timeout=1):
            model = Stack()
            parallelized = parallel.parallelize(
                model, None, SystemSettings(fsdp=True), CPU, compiled=False
            )
            for parameter in model.parameters():
                assert parameter.to_local().shape[0] < parameter.shape[0] or parameter.shape[0] == 1
            trained = [part for part in model.parameters() if part.requires_grad]
            for now in (False, False, True):
                with parallelized.gradient_sync(now):
                    batch = next(stream(0, 1))
                    parallelized.network(batch.images, batch.positions, batch.targets).backward()
                assert [part.grad is not None for part in trained] == [now] * len(trained)

    assert on_ranks(work) == ["", ""]


def test_a_sharded_state_is_gathered_tensor_by_tensor_and_kept_on_rank_0_alone(on_ranks):
    def work():
        with distributed.process_group(CPU, rank_timeout=1):
            state = State(Stack(), OPTIM, SystemSettings(fsdp=True), CPU, False, adamw)
            batch = next(stream(0, 1))
            state.parallel.network(batch.images, batch.positions, batch.targets).backward()
            state.update(0.5)
            gather, gathered = state.parallel.full_tensor, []

            def counted(part):
                assert all(full() is None for full in gathered)  # none of them is kept
                full = gather(part)
                if full is not part:  # it was sharded
                    gathered.append(weakref.ref(full))
                return full

            state.parallel.full_tensor = counted
            captured, _ = state.capture()
            assert len(gathered) > 20
            assert (captured is None) == (distributed.rank() == 1)

    assert on_ranks(work) == ["", ""]


def test_replicas_reduce_gradients_once_a_step(on_ranks, monkeypatch):
    class Counting(parallel.DistributedDataParallel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, self.reduce)
            self.calls = 0

        def reduce(self, _, bucket):
            calls.append(1)
            work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
            return work.then(lambda done: done.value()[0] / dist.get_world_size())

    calls = []
    monkeypatch.setattr(parallel, "DistributedDataParallel", Counting)

    def work():
        with distributed.process_group(CPU, rank_timeout=1):
            parallelized = parallel.parallelize(
                Stack(), None, SystemSettings(), CPU, compiled=False
            )
            for now in (False, False, True):
                with parallelized.gradient_sync(now):
                    batch = next(stream(0, 1))
                    parallelized.network(batch.images, batch.positions, batch.targets).backward()
                assert len(calls) == now

    assert on_ranks(work) == ["", ""]
