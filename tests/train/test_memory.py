"""The search for a division: models that run out of memory above a number of images."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldae import distributed
from ldae.data.workers import Batch
from ldae.errors import InputError
from ldae.runs.checkpoints import Checkpoints
from ldae.settings import OptimSettings, SystemSettings
from ldae.train.loop import Loop
from ldae.train.memory import fewest_micro_batches
from ldae.train.optim import adamw
from ldae.train.plan import Plan
from ldae.train.state import State
from ldae.train.update import Update

CPU = torch.device("cpu")
OPTIM = OptimSettings(batch_size=8, blr=1.0, warmup_epochs=0.5, ema=0.7)
IMAGES = 48


class Small(nn.Module):
    """Has memory for a number of images, and all kinds of state that a forward pass may change."""

    def __init__(self, room):
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.GELU()) for _ in range(2))
        self.register_buffer("passes", torch.zeros(1))
        self.room, self.calls, self.means = room, 0, []

    def forward(self, images, positions, labels):
        SEEN.append(positions.tolist())
        self.passes += 1
        self.calls += 1
        self.means.append(images.mean())
        x = images * (1 + 0.1 * torch.rand(3))
        for block in self.blocks:
            x = block(x)
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return (x[:, 0] - labels).square().mean() + 0.01 * self.passes[0] * x.mean()

    def after_step(self):
        self.passes += sum(self.means)
        self.means.clear()


SEEN = []  # the positions of each forward pass in this process


def batches(start, micro_batches, bad_at=None):
    rank, world = distributed.rank(), distributed.world_size()
    size = 8 // world // micro_batches
    for n in range(start, IMAGES, 8):
        for micro in range(micro_batches):
            first = n + (micro * world + rank) * size
            if bad_at is not None and n >= bad_at:
                raise InputError("image cat.jpg is truncated")
            positions = torch.arange(first, first + size)
            images = torch.stack([torch.sin(positions * k / 7) for k in (1.0, 2.0, 3.0)], 1)
            yield Batch(images, images.sum(1) ** 2, positions, [])


def run(folder, model, micro_batches=None, stream=batches, compiled=False):
    """Train to the end; without ``micro_batches`` the loop searches."""
    SEEN.clear()
    Loop(
        model,
        stream,
        Plan(16, IMAGES, 8, micro_batches or 1, searched=micro_batches is None),
        OPTIM,
        SystemSettings(log_every=100, workers=0),
        device=CPU,
        checkpoints=Checkpoints(folder),
        open_metrics=lambda seen: SimpleNamespace(write=print, close=lambda: None),
        describe={},
        compiled=compiled,
    ).train()
    distributed.barrier()
    return Checkpoints(folder).load()


def assert_same(one, two):
    for part in ("model", "average"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in two[part])
    for moments, others in zip(*(state["optimizer"]["state"].values() for state in (one, two))):
        assert all(torch.equal(moments[name], others[name]) for name in others)


def test_the_largest_micro_batch_that_fits_is_used_and_the_run_is_that_of_its_number(
    tmp_path, capsys
):
    found = run(tmp_path / "searched", Small(room=3))
    assert {len(positions) for positions in SEEN[2:]} == {2}  # 8, 4 and 2 images are tried
    assert found["division"] == {"ranks": 1, "micro_batches": 4}
    sentence = "8 images do not fit into the memory of a device: each step has 4 micro batches of 2"
    assert sentence in capsys.readouterr().out
    given = run(tmp_path / "given", Small(room=3), micro_batches=4)
    assert_same(found, given)
    assert given["division"] is None and sentence not in capsys.readouterr().out


def test_a_share_that_fits_is_tried_once_and_nothing_is_said(tmp_path, capsys):
    found = run(tmp_path / "searched", Small(room=8))
    assert len(SEEN) == IMAGES // 8 + 1 and "fit" not in capsys.readouterr().out
    assert SEEN[0] == list(range(IMAGES - 8, IMAGES))  # what begins late has begun there
    assert_same(found, run(tmp_path / "given", Small(room=8), micro_batches=1))


def test_a_resumed_run_keeps_the_division_whatever_fits_now(tmp_path):
    whole = run(tmp_path / "whole", Small(room=3))
    with pytest.raises(InputError, match="cat.jpg"):
        run(
            tmp_path / "parts",
            Small(room=3),
            stream=lambda start, micro_batches: batches(start, micro_batches, bad_at=24),
        )
    resumed = run(tmp_path / "parts", Small(room=8))
    assert {len(positions) for positions in SEEN} == {2}
    assert_same(resumed, whole)


class Tight(Small):
    """Has memory for two images beside the gradients of an earlier micro batch."""

    def forward(self, *batch):
        self.room = 4 if self.blocks[0][0].weight.grad is None else 2
        return super().forward(*batch)


def test_gradients_of_an_earlier_micro_batch_take_memory_too(tmp_path):
    assert run(tmp_path, Tight(room=4))["division"]["micro_batches"] == 4


class Joined(Small):
    """Its forward pass has a collective, as that of an adversarial loss."""

    def forward(self, images, positions, labels):
        mean = distributed.all_reduce_sum(images.mean())
        return super().forward(images, positions, labels) + 0 * mean


def test_ranks_agree_when_one_runs_out_of_memory_and_leave_none_waiting(on_ranks, tmp_path):
    def work():
        with distributed.process_group(CPU, rank_timeout=1):
            room = 1 if distributed.rank() else 4
            found = run(tmp_path / "searched", Joined(room))
            assert {len(positions) for positions in SEEN[3:]} == {1}  # 4, 2 and 1 are tried
            assert found["division"] == {"ranks": 2, "micro_batches": 4}
            assert_same(found, run(tmp_path / "given", Joined(room), micro_batches=4))

    assert on_ranks(work) == ["", ""]


def test_another_number_of_ranks_searches_anew(tmp_path):
    begin = run(tmp_path / "one", Small(room=3))
    division = {"ranks": 2, "micro_batches": 4}
    Checkpoints(tmp_path / "two").save(begin | {"images_seen": 8, "division": division})
    found = run(tmp_path / "two", Small(room=4))
    assert found["division"] == {"ranks": 1, "micro_batches": 2}


def test_too_little_memory_for_one_image_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="train on 1 image at a time: set a lower system.memory"):
        run(tmp_path, Small(room=0))
    assert Checkpoints(tmp_path).paths() == []


def test_a_search_leaves_everything_as_it_was():
    model = Small(room=3)
    state = State(model, OPTIM, SystemSettings(), CPU, False, adamw)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    model.means.append(1.0)
    random = torch.get_rng_state()
    whole = next(batches(0, 1))
    assert fewest_micro_batches(Update(state), whole, Plan(16, IMAGES, 8, 1)) == 4
    assert all(torch.equal(before[name], part) for name, part in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (model.calls, model.means, state.optimizer.state_dict()["state"]) == (0, [1.0], {})
    assert torch.equal(torch.get_rng_state(), random)


def test_the_memory_of_the_moments_is_reserved_until_they_exist():
    state = State(Small(room=8), OPTIM, SystemSettings(), CPU, False, adamw)
    reserved = sum(part.nbytes for part in state.reserve())
    Update(state)([next(batches(0, 1))], 0.7)
    moments = state.optimizer.state_dict()["state"].values()
    assert reserved == sum(part.nbytes for each in moments for part in each.values() if part.ndim)
    assert state.reserve() == []


def test_a_search_compiles_each_size_once(tmp_path, monkeypatch):
    """So the training reuses the graphs of the last trial, and no limit of compilations ends it."""
    sizes, compile = [], torch.compile

    def backend(graph, inputs):
        (shape,) = {value.shape[0] for value in inputs if value.shape[1:] == (3,) != (3, 3)} - {3}
        sizes.append(shape)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 2)
    monkeypatch.setattr(torch, "compile", lambda *args, **how: compile(
        *args, **how | {"backend": backend, "options": None}
    ))  # fmt: skip
    run(tmp_path, Small(room=2), compiled=True)
    assert sizes == [8, 8, 4, 4, 2, 2]  # the input of the first block takes no gradient
    torch._dynamo.reset()
