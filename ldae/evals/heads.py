"""Linear heads on frozen features: many trained in one pass, and a part of train that chooses."""

import math
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn
from tyro.conf import Fixed

from ldae.console import progress
from ldae.distributed import all_reduce_sum, is_main, rank, world_size
from ldae.evals.accuracy import ranks
from ldae.evals.features import Features, rows_on
from ldae.evals.protocol import Protocol
from ldae.evals.taps import Tap
from ldae.tree import COUNT, NOT_NEGATIVE, POSITIVE

_ROWS_AT_ONCE = 1024

# As many logits as a CPU's cache holds: beyond it, heads of a thousand classes take longer.
_LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**27}
_BATCHNORM_MOMENTUM = 0.1  # PyTorch's
_FEW_UPDATES = 50  # after which 0.9^50, half a percent, is left of the first statistics


class HeadConstants(typing.Protocol):
    """What a protocol says of a head."""

    batchnorm_eps: float
    init_std: float
    seed: int


@dataclass(frozen=True)
class Head:
    """One candidate of a sweep."""

    tap: Tap
    learning_rate: float
    """At a batch of 256."""
    weight_decay: float = 0.0
    """Of the weight, not of the bias."""

    def record(self) -> dict:
        return {
            "tap": str(self.tap),
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
        }


@dataclass(frozen=True)
class SweepProtocol(Protocol):
    """The constants of a sweep.

    Source: head, schedule and epochs of MAE, main_linprobe.py; rates and optimizer of DINOv2,
    eval/linear.py, over a range that also fits averaged features of small models.
    """

    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (
        0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
    )  # fmt: skip
    """At a batch of 256, all trained together; times total_batch / 256 in use."""
    weight_decays: Annotated[tuple[float, ...], NOT_NEGATIVE] = (0.0,)
    """Of the weight, not of the bias; each with each learning rate."""
    epochs: Annotated[int, COUNT] = 90
    """Passes over the features of train."""
    total_batch: Annotated[int, COUNT] = 512
    """Images of one update, and of BatchNorm's statistics."""
    momentum: Fixed[float] = 0.9
    batchnorm_eps: Fixed[float] = 1e-6
    init_std: Fixed[float] = 0.01
    held_out: Fixed[int] = 10
    """One in so many train images, by the hash of its name, chooses the head."""
    seed: Fixed[int] = 0
    """Of the initial weights and of the order of the batches."""

    def heads_of(self, taps: Iterable[Tap]) -> list[Head]:
        """Each tap with each weight decay and each learning rate."""
        return [
            Head(tap, rate, decay)
            for tap in taps
            for decay in self.weight_decays
            for rate in self.learning_rates
        ]


class Heads(nn.Module):
    """H linear classifiers behind one BatchNorm without affine: (B, D) -> (B, H, C)."""

    def __init__(self, heads: int, dim: int, classes: int, protocol: HeadConstants):
        super().__init__()
        generator = torch.Generator().manual_seed(protocol.seed)
        weight = torch.empty(classes, dim)
        nn.init.trunc_normal_(weight, std=protocol.init_std, generator=generator)
        self.norm = nn.BatchNorm1d(dim, eps=protocol.batchnorm_eps, affine=False)
        self.weight = nn.Parameter(weight.repeat(heads, 1, 1))  # all start from the same
        self.bias = nn.Parameter(torch.zeros(heads, classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.logits(self.norm(features))

    def logits(self, normed: torch.Tensor, some: slice = slice(None)) -> torch.Tensor:
        """(B, H, C) by some of the heads, of features that went through BatchNorm, in one product."""
        weight, bias = self.weight[some], self.bias[some]
        return F.linear(normed, weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)

    def blocks(self, rows: int) -> Iterator[slice]:
        """The heads, as many at a time as there should be logits of so many rows."""
        heads, classes = self.bias.shape
        at_once = max(_LOGITS_AT_ONCE[self.bias.device.type] // (rows * classes), 1)
        return (slice(first, first + at_once) for first in range(0, heads, at_once))

    def normalise(
        self, features: torch.Tensor, mean: torch.Tensor, var: torch.Tensor
    ) -> torch.Tensor:
        """BatchNorm by the statistics (D,) of a batch."""
        return (features - mean) * (var + self.norm.eps).rsqrt()

    def normalise_batch(self, features: torch.Tensor, count: int) -> torch.Tensor:
        """BatchNorm by the statistics of a batch of ``count`` rows over all ranks, which the running
        ones follow; ``features`` (B, D) are this rank's rows."""
        mean = all_reduce_sum(features.sum(0)) / count
        var = all_reduce_sum((features - mean).square().sum(0)) / count
        self.track(mean, var, count)
        return self.normalise(features, mean, var)

    def track(self, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
        """Move the running statistics towards those of a batch of ``count`` images."""
        unbiased = var * (count / max(count - 1, 1))
        self.norm.running_mean.lerp_(mean, _BATCHNORM_MOMENTUM)
        self.norm.running_var.lerp_(unbiased, _BATCHNORM_MOMENTUM)

    @torch.no_grad()
    def gradients(
        self, normed: torch.Tensor, labels: torch.Tensor, count: int, some: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the summed cross-entropy over ``count``, by weight (H, C, D) and by bias (H, C) of some
        of the heads."""
        error = self.logits(normed, some).softmax(2)  #            (B, H, C)
        error[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        error /= count
        weight = (error.flatten(1).T @ normed).unflatten(0, error.shape[1:])
        return weight, error.sum(0)


class _Pass:
    """The heads of one tap while they are trained by SGD with momentum, each at its own rate."""

    def __init__(self, wanted: Sequence[Head], heads: Heads, protocol: SweepProtocol) -> None:
        self.heads, self.momentum = heads, protocol.momentum
        device, scale = heads.weight.device, protocol.total_batch / 256
        self.rates = torch.tensor([head.learning_rate * scale for head in wanted], device=device)
        self.decays = torch.tensor([head.weight_decay for head in wanted], device=device)
        self.moments = [torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)]

    @torch.no_grad()
    def update(
        self, features: torch.Tensor, labels: torch.Tensor, count: int, lr_factor: float
    ) -> None:
        """One step on a batch of ``count`` images, of which this rank holds these."""
        heads = self.heads
        normed = heads.normalise_batch(features, count)
        for some in heads.blocks(count):
            slopes = [all_reduce_sum(part) for part in heads.gradients(normed, labels, count, some)]
            slopes[0] += self.decays[some, None, None] * heads.weight[some]
            for values, moments, slope in zip((heads.weight, heads.bias), self.moments, slopes):
                moment = moments[some].mul_(self.momentum).add_(slope)
                rates = self.rates[some].view(-1, *[1] * (moment.ndim - 1))
                values[some] -= lr_factor * rates * moment


def train_heads(
    train: Features,
    wanted: Sequence[Head],
    classes: int,
    protocol: SweepProtocol,
    device: torch.device,
    chosen: torch.Tensor | None = None,
) -> dict[Tap, Heads]:
    """All of ``wanted`` trained together, by their taps and in their order.

    Each is what it would be alone. ``train`` is this rank's share, and ``chosen`` (N,) tells of all
    images which are learned from; each rank computes with what it has of a batch, and all ranks
    come to the same heads. A last batch that is short is left out, and its images come earlier in
    other epochs: BatchNorm has no variance for a batch of one. Fewer images than a batch are one.
    """
    images = images_of(train, device)
    numbers = torch.arange(images) if chosen is None else chosen.nonzero()[:, 0]
    features, labels = rows_on(train.features, device), train.labels.to(device)
    passes = {}
    for tap, columns in train.columns.items():
        mine = [head for head in wanted if head.tap == tap]
        if mine:
            dim = len(range(*columns.indices(features.shape[1])))
            heads = Heads(len(mine), dim, classes, protocol).to(device)
            passes[tap] = _Pass(mine, heads, protocol)
    generator = torch.Generator().manual_seed(protocol.seed)
    steps = max(len(numbers) // protocol.total_batch, 1)
    with progress(protocol.epochs, "probe") as bar:
        for epoch in range(protocol.epochs):
            order = numbers[torch.randperm(len(numbers), generator=generator)]
            for step, batch in enumerate(order.split(protocol.total_batch)[:steps]):
                done = (epoch * steps + step) / (protocol.epochs * steps)
                lr_factor = (1 + math.cos(math.pi * done)) / 2
                own = batch[batch % world_size() == rank()] // world_size()
                rows = features[own.to(features.device)].to(device)
                targets = labels[own.to(device)]
                for tap, training in passes.items():
                    training.update(rows[:, train.columns[tap]], targets, len(batch), lr_factor)
            bar.update()
    return {tap: training.heads.eval() for tap, training in passes.items()}


@torch.inference_mode()
def grade_heads(
    heads: dict[Tap, Heads],
    features: Features,
    device: torch.device,
    chosen: torch.Tensor | None = None,
) -> dict[Tap, torch.Tensor]:
    """Top-1 and top-5 of every head in percent, float64 (H, 2), by tap; all images count once.

    ``features`` are this rank's share, ``chosen`` (N,) tells of all images which are graded.
    """
    own = torch.arange(len(features.labels))
    if chosen is not None:
        own = chosen[rank() :: world_size()].nonzero()[:, 0]
    hits = {tap: torch.zeros(len(part.bias), 2, dtype=torch.float64) for tap, part in heads.items()}
    for batch in own.split(_ROWS_AT_ONCE):
        rows, labels = features.features[batch].to(device), features.labels[batch].to(device)
        for tap, part in heads.items():
            logits = part(rows[:, features.columns[tap]])  #                   (B, H, C)
            placed = ranks(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]))
            placed = placed.view(logits.shape[:2])
            found = torch.stack([(placed < n).sum(0) for n in (1, 5)], 1)
            hits[tap] += found.cpu()
    graded = all_reduce_sum(torch.tensor(len(own), device=device)).item()
    return {
        tap: 100 * all_reduce_sum(found.to(device)).cpu() / graded for tap, found in hits.items()
    }


def sweep(
    train: Features,
    held: torch.Tensor,
    classes: int,
    heads: list[Head],
    protocol: SweepProtocol,
    device: torch.device,
) -> dict[Head, float]:
    """Top-1 in percent of every head on the held-out part of ``train``, all from one pass.

    ``train`` is this rank's share; ``held`` (N,) tells which of all train images choose.
    """
    updates = protocol.epochs * max(int((~held).sum()) // protocol.total_batch, 1)
    if updates < _FEW_UPDATES and is_main():
        print(
            f"{updates} updates are few for BatchNorm's running statistics, which are still those that "
            "it began with in part: ask for more epochs",
            flush=True,
        )
    trained = train_heads(train, heads, classes, protocol, device, chosen=~held)
    found = grade_heads(trained, train, device, chosen=held)
    top1 = {tap: iter(tops[:, 0].tolist()) for tap, tops in found.items()}
    return {head: next(top1[head.tap]) for head in heads}


def images_of(share: Features, device: torch.device) -> int:
    """How many images all ranks hold together."""
    return int(all_reduce_sum(torch.tensor(len(share.labels), device=device)))
