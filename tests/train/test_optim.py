import math

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from ldae.settings import OptimSettings
from ldae.train.optim import adamw, ema_decay, lr_at, peak_lr, set_lr


def test_the_peak_rate_is_proportional_to_the_batch():
    assert peak_lr(OptimSettings(batch_size=2048, blr=1e-4)) == pytest.approx(8e-4)


def test_the_rate_is_a_linear_warmup_and_a_half_cosine():
    def rate(seen):
        return lr_at(seen, peak=2.0, warmup=100, total=300)

    assert rate(0) == 0 and rate(50) == 1.0 and rate(100) == 2.0
    assert rate(200) == pytest.approx(1.0) and rate(300) == pytest.approx(0.0)
    assert rate(250) == pytest.approx(1 + math.cos(math.pi * 0.75))
    assert lr_at(0, peak=2.0, warmup=0, total=300) == 2.0


def test_the_cosine_ends_at_the_minimum_rate():
    rates = [lr_at(n, peak=2.0, warmup=100, total=300, minimum=0.5) for n in (50, 100, 200, 300)]
    assert rates == pytest.approx([1.0, 2.0, 1.25, 0.5])


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_the_decay_of_the_average_warms_up_as_timms(decay):
    reference = ModelEmaV3(nn.Linear(1, 1), decay, use_warmup=True)
    optim = OptimSettings(ema=decay, ema_warmup=True)
    for step in (0, 1, 2, 3, 10, 1000, 10**6, 10**8):  # timm counts the update itself
        assert ema_decay(step, optim) == pytest.approx(reference.get_decay(step + 1))
        assert ema_decay(step, OptimSettings(ema=decay)) == decay


@pytest.mark.parametrize("steps, share", [(4_883, 0.61), (925, 0.91)])
def test_a_warm_average_forgets_the_initial_weights(steps, share):
    """100 epochs of the recipe ldae at batch 1024, on CIFAR-10 and on Imagenette."""
    for warmup, expected in ((False, share), (True, 0.0)):
        optim = OptimSettings(ema=0.9999, ema_warmup=warmup)
        left = math.prod(ema_decay(step, optim) for step in range(steps))
        assert left == pytest.approx(expected, abs=0.005)


def test_a_model_may_declare_its_parameter_groups():
    class Layers(nn.Linear):
        def parameter_groups(self, weight_decay):
            return [
                {"params": [self.weight], "weight_decay": weight_decay, "lr_scale": 0.25},
                {"params": [self.bias], "weight_decay": 0.0},
            ]

    optimizer = adamw(Layers(2, 3), OptimSettings(weight_decay=0.1))
    set_lr(optimizer, 0.8)
    groups = [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups]
    assert groups == [(0.1, 0.2), (0.0, 0.8)]


def test_only_matrices_are_decayed():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    groups = adamw(model, OptimSettings(weight_decay=0.1)).param_groups
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decayed == {id(p): 0.1 if p.ndim == 2 else 0.0 for p in model.parameters()}
    assert torch.equal(torch.tensor([g["fused"] for g in groups]), torch.tensor([True, True]))


def test_frozen_parameters_are_not_optimized():
    model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2))
    groups = adamw(model, OptimSettings()).param_groups
    assert {id(p) for group in groups for p in group["params"]} == {*map(id, model[1].parameters())}
