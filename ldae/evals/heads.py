"""Linear heads on frozen features, many trained in one pass, and the sweep that chooses one."""

import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn
from tyro.conf import Fixed

from ldae.console import print_main, progress
from ldae.distributed import all_reduce_sum, rank, world_size
from ldae.evals.accuracy import label_ranks
from ldae.evals.features import Features, move_if_fits
from ldae.evals.protocol import Protocol
from ldae.evals.taps import Tap
from ldae.tree import COUNT, NOT_NEGATIVE, POSITIVE

_ROWS_AT_ONCE = 1024

# As many logits as fit the cache of a CPU; with more, heads of a thousand classes are slower.
_LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**27}
_BATCHNORM_MOMENTUM = 0.1  # PyTorch's
_FEW_UPDATES = 50  # after 50 updates, 0.9^50 = 0.5 % of the initial statistics is left


class HeadConstants(typing.Protocol):
    """The constants of a protocol that has a head."""

    batchnorm_eps: float
    init_std: float
    seed: int


@dataclass(frozen=True)
class Head:
    """A candidate of a sweep."""

    tap: Tap
    learning_rate: float
    """Rate at a batch of 256."""
    weight_decay: float = 0.0
    """Decay of the weight, not of the bias."""

    def record(self) -> dict:
        return vars(self) | {"tap": str(self.tap)}


@dataclass(frozen=True)
class SweepProtocol(Protocol):
    """The constants of a sweep.

    Source: head, schedule and epochs of MAE, main_linprobe.py; rates and optimizer of DINOv2,
    eval/linear.py, over a range that also fits averaged features of small models.
    """

    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (
        0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
    )  # fmt: skip
    """Rates at a batch of 256, scaled by total_batch / 256. All are trained together."""
    weight_decays: Annotated[tuple[float, ...], NOT_NEGATIVE] = (0.0,)
    """Decays of the weight, not of the bias, each tried with each learning rate."""
    epochs: Annotated[int, COUNT] = 90
    """Passes over the features of train."""
    total_batch: Annotated[int, COUNT] = 512
    """Images of one update and of BatchNorm's statistics."""
    momentum: Fixed[float] = 0.9
    batchnorm_eps: Fixed[float] = 1e-6
    init_std: Fixed[float] = 0.01
    held_out: Fixed[int] = 10
    """One of this many train images, chosen by a hash of its name, is held out to choose the
    head."""
    seed: Fixed[int] = 0
    """Seed of the initial weights and of the order of the batches."""

    def heads_of(self, taps: Iterable[Tap]) -> list[Head]:
        """Combine each tap with each weight decay and each learning rate."""
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
        self.weight = nn.Parameter(weight.repeat(heads, 1, 1))  # all heads start equal
        self.bias = nn.Parameter(torch.zeros(heads, classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.logits(self.norm(features))

    def logits(self, normed: torch.Tensor, some: slice = slice(None)) -> torch.Tensor:
        """Return the logits (B, H, C) of some heads, from features behind BatchNorm."""
        weight, bias = self.weight[some], self.bias[some]
        return F.linear(normed, weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)

    def blocks(self, rows: int) -> Iterator[slice]:
        """Divide the heads into blocks, to bound the number of logits of ``rows`` rows."""
        heads, classes = self.bias.shape
        at_once = max(_LOGITS_AT_ONCE[self.bias.device.type] // (rows * classes), 1)
        return (slice(first, first + at_once) for first in range(0, heads, at_once))

    def normalise(
        self, features: torch.Tensor, mean: torch.Tensor, var: torch.Tensor
    ) -> torch.Tensor:
        """Apply BatchNorm with the statistics (D,) of a batch."""
        return (features - mean) * (var + self.norm.eps).rsqrt()

    def normalise_batch(self, features: torch.Tensor, count: int) -> torch.Tensor:
        """Apply BatchNorm with the statistics of a batch, and update the running statistics.

        ``features`` (B, D) are this rank's rows of the ``count`` rows of all ranks.
        """
        mean = all_reduce_sum(features.sum(0)) / count
        var = all_reduce_sum((features - mean).square().sum(0)) / count
        self.track(mean, var, count)
        return self.normalise(features, mean, var)

    def track(self, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
        """Move the running statistics towards the statistics of a batch of ``count`` rows."""
        unbiased = var * (count / max(count - 1, 1))
        self.norm.running_mean.lerp_(mean, _BATCHNORM_MOMENTUM)
        self.norm.running_var.lerp_(unbiased, _BATCHNORM_MOMENTUM)

    @torch.no_grad()
    def gradients(
        self, normed: torch.Tensor, labels: torch.Tensor, count: int, some: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients by weight (H, C, D) and by bias (H, C) of some of the heads.

        The loss is the cross-entropy summed over this rank's rows, divided by ``count``.
        """
        error = self.logits(normed, some).softmax(2)  #            (B, H, C)
        error[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        error /= count
        weight = (error.flatten(1).T @ normed).unflatten(0, error.shape[1:])
        return weight, error.sum(0)


class _TapTraining:
    """The training of the heads of one tap by SGD with momentum, each at its own learning rate."""

    def __init__(self, settings: Sequence[Head], heads: Heads, protocol: SweepProtocol) -> None:
        self.heads, self.momentum = heads, protocol.momentum
        device, scale = heads.weight.device, protocol.total_batch / 256
        self.rates = torch.tensor([head.learning_rate * scale for head in settings], device=device)
        self.decays = torch.tensor([head.weight_decay for head in settings], device=device)
        self.moments = [torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)]

    @torch.no_grad()
    def update(
        self, features: torch.Tensor, labels: torch.Tensor, count: int, lr_factor: float
    ) -> None:
        """Take one step on a batch of ``count`` images, with this rank's rows of the batch.

        ``lr_factor`` is the share of the peak learning rates in this step.
        """
        heads = self.heads
        normed = heads.normalise_batch(features, count)
        for some in heads.blocks(count):
            gradients = [all_reduce_sum(g) for g in heads.gradients(normed, labels, count, some)]
            gradients[0] += self.decays[some, None, None] * heads.weight[some]
            for values, moments, gradient in zip(
                (heads.weight, heads.bias), self.moments, gradients
            ):
                moment = moments[some].mul_(self.momentum).add_(gradient)
                rates = self.rates[some].view(-1, *[1] * (moment.ndim - 1))
                values[some] -= lr_factor * rates * moment


def train_heads(
    train: Features,
    settings: Sequence[Head],
    classes: int,
    protocol: SweepProtocol,
    device: torch.device,
    chosen: torch.Tensor | None = None,
) -> dict[Tap, Heads]:
    """Train heads together; return the heads of each tap, in the order of their ``settings``.

    Each head is trained as if on its own. Each rank computes with its images of a batch, and all
    ranks get the same heads. A short last batch is left out, because BatchNorm has no variance in a
    batch of one; its images come earlier in other epochs. Fewer images than a batch are one batch.

    Args:
        train: this rank's share.
        chosen: bool (N,), which of the images of all ranks are learned from; by default all.
    """
    images = torch.arange(count_images(train, device)) if chosen is None else chosen.nonzero()[:, 0]
    features, labels = move_if_fits(train.features, device), train.labels.to(device)
    trainings = {}
    for tap, columns in train.columns.items():
        of_tap = [head for head in settings if head.tap == tap]
        if of_tap:
            dim = len(range(*columns.indices(features.shape[1])))
            heads = Heads(len(of_tap), dim, classes, protocol).to(device)
            trainings[tap] = _TapTraining(of_tap, heads, protocol)
    generator = torch.Generator().manual_seed(protocol.seed)
    steps = max(len(images) // protocol.total_batch, 1)
    with progress(protocol.epochs, "probe") as bar:
        for epoch in range(protocol.epochs):
            order = images[torch.randperm(len(images), generator=generator)]
            for step, batch in enumerate(order.split(protocol.total_batch)[:steps]):
                done = (epoch * steps + step) / (protocol.epochs * steps)
                lr_factor = (1 + math.cos(math.pi * done)) / 2
                share = batch[batch % world_size() == rank()] // world_size()
                rows = features[share.to(features.device)].to(device)
                targets = labels[share.to(device)]
                for tap, training in trainings.items():
                    training.update(rows[:, train.columns[tap]], targets, len(batch), lr_factor)
            bar.update()
    return {tap: training.heads.eval() for tap, training in trainings.items()}


class Classifiers(typing.Protocol):
    """H classifiers behind one set of features, with the biases (H, C)."""

    @property
    def bias(self) -> torch.Tensor: ...

    def __call__(self, features: torch.Tensor, /) -> torch.Tensor: ...


def grade_heads(
    heads: Mapping[Tap, Classifiers],
    features: Features,
    device: torch.device,
    chosen: torch.Tensor | None = None,
) -> dict[Tap, torch.Tensor]:
    """Return top-1 and top-5 of every head in percent, float64 (H, 2), by tap.

    Args:
        features: this rank's share; each image counts once over all ranks.
        chosen: bool (N,), which of the images of all ranks are graded; by default all.
    """
    hits, images = count_hits(heads, features, device, chosen)
    return {tap: 100 * counts / images for tap, counts in hits.items()}


@torch.inference_mode()
def count_hits(
    heads: Mapping[Tap, Classifiers],
    features: Features,
    device: torch.device,
    chosen: torch.Tensor | None = None,
) -> tuple[dict[Tap, torch.Tensor], int]:
    """Return the hits of every head by top-1 and top-5, float64 (H, 2), and the number of images.

    The arguments are those of ``grade_heads``.
    """
    share = torch.arange(len(features.labels))
    if chosen is not None:
        share = chosen[rank() :: world_size()].nonzero()[:, 0]
    hits = {tap: torch.zeros(len(part.bias), 2, dtype=torch.float64) for tap, part in heads.items()}
    for batch in share.split(_ROWS_AT_ONCE):
        rows, labels = features.features[batch].to(device), features.labels[batch].to(device)
        for tap, part in heads.items():
            logits = part(rows[:, features.columns[tap]])  #                   (B, H, C)
            placed = label_ranks(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]))
            placed = placed.view(logits.shape[:2])
            hits[tap] += torch.stack([(placed < n).sum(0) for n in (1, 5)], 1).cpu()
    images = int(all_reduce_sum(torch.tensor(len(share), device=device)))
    return {tap: all_reduce_sum(counts.to(device)).cpu() for tap, counts in hits.items()}, images


def report_few_updates(held: torch.Tensor, protocol: SweepProtocol) -> None:
    """Report a sweep of few updates, whose held-out images are marked in ``held`` (N,)."""
    updates = protocol.epochs * max(int((~held).sum()) // protocol.total_batch, 1)
    if updates < _FEW_UPDATES:
        print_main(
            f"{updates} updates are few: BatchNorm's running statistics still hold a part of their "
            "initial values; ask for more epochs"
        )


def sweep(
    train: Features,
    held: torch.Tensor,
    classes: int,
    heads: list[Head],
    protocol: SweepProtocol,
    device: torch.device,
) -> dict[Head, float]:
    """Return the top-1 in percent of every head on the held-out images, from one training.

    ``train`` is this rank's share; ``held`` (N,) marks which of all train images are held out.
    """
    trained = train_heads(train, heads, classes, protocol, device, chosen=~held)
    graded = grade_heads(trained, train, device, chosen=held)
    top1 = {tap: iter(accuracies[:, 0].tolist()) for tap, accuracies in graded.items()}
    return {head: next(top1[head.tap]) for head in heads}


def count_images(share: Features, device: torch.device) -> int:
    """Count the images of all ranks together."""
    return int(all_reduce_sum(torch.tensor(len(share.labels), device=device)))
