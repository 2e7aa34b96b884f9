import math

import pytest
import torch
from torch import nn

from ldae.settings import Optim
from ldae.train.optim import adamw, lr_at, peak_lr


def test_the_rate_scales_with_the_batch():
    assert peak_lr(Optim(batch_size=2048, blr=1e-4)) == pytest.approx(8e-4)


def test_warmup_is_linear_and_the_rest_half_a_cosine():
    def rate(seen):
        return lr_at(seen, peak=2.0, warmup=100, total=300)

    assert rate(0) == 0 and rate(50) == 1.0 and rate(100) == 2.0
    assert rate(200) == pytest.approx(1.0) and rate(300) == pytest.approx(0.0)
    assert rate(250) == pytest.approx(1 + math.cos(math.pi * 0.75))
    assert lr_at(0, peak=2.0, warmup=0, total=300) == 2.0


def test_only_matrices_are_decayed():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    groups = adamw(model, Optim(weight_decay=0.1)).param_groups
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decayed == {id(p): 0.1 if p.ndim == 2 else 0.0 for p in model.parameters()}
    assert torch.equal(torch.tensor([g["fused"] for g in groups]), torch.tensor([True, True]))
