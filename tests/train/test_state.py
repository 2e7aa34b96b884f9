"""A captured state is a copy, and restoring it restores the training."""

import torch
from torch import nn

from ldae.settings import OptimSettings, SystemSettings
from ldae.train.optim import adamw
from ldae.train.state import State, map_tensors

CPU = torch.device("cpu")


def new_state(ema=0.5):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optim = OptimSettings(batch_size=4, blr=1.0, ema=ema)
    return State(model, optim, SystemSettings(), CPU, False, adamw)


def step(state, seed):
    images = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    state.parallel.network(images).square().sum().backward()
    state.update(0.5)


def tensors(state):
    pairs = []
    map_tensors(state, lambda name, part: pairs.append((name, part.clone())))
    return pairs


def assert_same(one, other):
    assert [name for name, _ in one] == [name for name, _ in other]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))


def test_training_does_not_change_a_captured_state():
    state = new_state()
    step(state, 0)
    captured, _ = state.capture()
    before = tensors(captured)
    step(state, 1)
    assert_same(tensors(captured), before)
    address = captured["model"]["0.weight"].data_ptr()
    assert state.capture()[0]["model"]["0.weight"].data_ptr() == address  # the memory is reused


def test_a_restored_training_equals_the_captured_one():
    state, other = new_state(), new_state()
    for seed in range(3):
        step(state, seed)
    captured = map_tensors(state.capture()[0], lambda _, part: part.clone())
    step(state, 3)
    other.restore(captured)
    step(other, 3)
    assert_same(tensors(other.capture()[0]), tensors(state.capture()[0]))
    assert len(tensors(captured)) > 7 + 7 + 4 * 3 - 1
    assert state.inference_model() is state.average
    assert new_state(ema=0).inference_model().training


class Counts(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
        self.calls, self.started = 0, False


def test_plain_counts_are_reset():
    model = nn.Sequential(Counts())
    state = State(model, OptimSettings(), SystemSettings(), CPU, False, adamw)
    model[0].calls, model[0].started, weight = 7, True, model[0].weight
    state.reset_counts()
    assert (model[0].calls, model[0].started) == (0, False) and model[0].weight is weight


def test_a_reset_keeps_the_mode_of_the_model():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout()).eval()  # as a backbone is opened
    state = State(model, OptimSettings(batch_size=4), SystemSettings(), CPU, False, adamw)
    model.train()
    state.reset_counts()
    assert all(module.training for module in model.modules())
