"""Many heads on features that are extracted once, and a part of train that chooses among them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from tyro.conf import Fixed

from ldae.distributed import is_main
from ldae.evals.features import Features
from ldae.evals.heads import Head, grade_heads, train_heads
from ldae.evals.protocol import Protocol
from ldae.evals.taps import Tap
from ldae.tree import COUNT, NOT_NEGATIVE, POSITIVE

_FEW_UPDATES = 50  # after which 0.9^50, half a percent, is left of the first statistics


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
