"""Heads trained together equal heads trained one by one."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from ldae.evals.accuracy import label_ranks
from ldae.evals.features import Features
from ldae.evals.heads import Head, grade_heads, sweep, train_heads
from ldae.evals.taps import Tap

CPU = torch.device("cpu")
OUTPUT, WIDE = Tap(), Tap(0, "cls+avg")


@dataclass(frozen=True)
class Short:
    """Constants of a short training."""

    epochs: int = 3
    total_batch: int = 32
    momentum: float = 0.9
    batchnorm_eps: float = 1e-6
    init_std: float = 0.01
    seed: int = 0


SHORT = Short()


def slow_probe(train: Features, head: Head, chosen=None) -> torch.nn.Sequential:
    """Train one head as MAE's script does: modules, torch's SGD at the rate, a fixed order."""
    features = train.features[:, train.columns[head.tap]]
    numbers = torch.arange(len(features)) if chosen is None else chosen.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(SHORT.seed)
    classes = int(train.labels.max()) + 1
    norm = torch.nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6)
    linear = torch.nn.Linear(features.shape[1], classes)
    torch.nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
    torch.nn.init.zeros_(linear.bias)
    model = torch.nn.Sequential(norm, linear)
    groups = [
        {"params": [linear.weight], "weight_decay": head.weight_decay},
        {"params": [linear.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    generator.manual_seed(SHORT.seed)
    steps = len(numbers) // SHORT.total_batch
    for epoch in range(SHORT.epochs):
        order = numbers[torch.randperm(len(numbers), generator=generator)]
        for step in range(steps):
            batch = order[step * SHORT.total_batch : (step + 1) * SHORT.total_batch]
            done = (epoch * steps + step) / (SHORT.epochs * steps)
            for group in optimizer.param_groups:
                cosine = 0.5 * (1 + math.cos(math.pi * done))
                group["lr"] = head.learning_rate * SHORT.total_batch / 256 * cosine
            optimizer.zero_grad()
            F.cross_entropy(model(features[batch]), train.labels[batch]).backward()
            optimizer.step()
    return model.eval()


def two_taps(features: Features) -> Features:
    """Make a tap of the first five columns, and another of all but the first."""
    return features._replace(columns={OUTPUT: slice(0, 5), WIDE: slice(1, 8)})


def test_heads_trained_together_equal_heads_trained_alone(cloud):
    """There are two taps, three rates and two decays; a last batch of 4 is left out."""
    train, queries = two_taps(cloud(100, 0)), two_taps(cloud(50, 1))
    wanted = [
        Head(tap, rate, decay)
        for decay in (0.0, 0.3)
        for tap in (WIDE, OUTPUT)
        for rate in (0.01, 0.1, 1.0)
    ]
    together = train_heads(train, wanted, 4, SHORT, CPU)
    for tap, heads in together.items():
        rows = queries.features[:, queries.columns[tap]]
        own = [head for head in wanted if head.tap == tap]
        for number, head in enumerate(own):
            alone = slow_probe(train, head)
            logits = alone(rows)
            assert torch.allclose(heads(rows)[:, number], logits, atol=1e-5), head
            assert torch.allclose(heads.weight[number], alone[1].weight, atol=1e-6)
            assert logits.std() > 0.01  # the head has moved away from its start
    assert not torch.allclose(together[WIDE].weight[2], together[WIDE].weight[5], atol=1e-3)


def test_only_chosen_images_are_learned_from(cloud):
    train, queries = cloud(150, 0), cloud(50, 1).features
    chosen = torch.arange(150) % 3 > 0
    head = Head(OUTPUT, 0.5)
    found = train_heads(train, [head], 4, SHORT, CPU, chosen)[OUTPUT](queries)[:, 0]
    assert torch.allclose(found, slow_probe(train, head, chosen)(queries), atol=1e-5)


def test_a_sweep_grades_held_out_images_by_heads_of_the_others(cloud):
    train = cloud(150, 0)
    held, heads = torch.arange(150) % 3 == 0, [Head(OUTPUT, 0.01), Head(OUTPUT, 2.0)]
    found = sweep(train, held, 4, heads, SHORT, CPU)
    for head in heads:
        logits = slow_probe(train, head, ~held)(train.features[held])
        right = logits.argmax(1) == train.labels[held]
        assert found[head] == pytest.approx(100 * right.double().mean().item())


def test_a_diverged_head_does_not_affect_the_others(cloud):
    train, queries = cloud(100, 0), cloud(50, 1).features
    calm, wild = Head(OUTPUT, 0.1), Head(OUTPUT, float("inf"))
    alone = train_heads(train, [calm], 4, SHORT, CPU)[OUTPUT](queries)[:, 0]
    both = train_heads(train, [calm, wild], 4, SHORT, CPU)[OUTPUT](queries)
    assert torch.allclose(both[:, 0], alone, atol=1e-5)
    assert both[:, 1].isnan().any()


@pytest.mark.parametrize("count", [2, 33, 65])
def test_short_last_batches_do_not_spoil_the_statistics(cloud, count):
    heads = train_heads(cloud(count, 0), [Head(OUTPUT, 0.1)], 4, SHORT, CPU)[OUTPUT]
    assert heads(cloud(9, 1).features).isfinite().all()


def test_grades_count_every_chosen_image_once(cloud, monkeypatch):
    monkeypatch.setattr("ldae.evals.heads._ROWS_AT_ONCE", 7)
    features = cloud(60, 0, classes=9, dim=12)
    heads = train_heads(features, [Head(OUTPUT, rate) for rate in (0.01, 1.0)], 9, SHORT, CPU)
    chosen = torch.arange(60) % 4 > 0
    for mask in (None, chosen):
        kept = slice(None) if mask is None else mask
        found = grade_heads(heads, features, CPU, mask)[OUTPUT]
        for number in range(2):
            logits = heads[OUTPUT](features.features[kept])[:, number]
            placed = label_ranks(logits, features.labels[kept])
            assert found[number].tolist() == pytest.approx(
                [100 / len(placed) * int((placed < n).sum()) for n in (1, 5)]
            )
