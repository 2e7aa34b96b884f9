"""Subsets of the train images: held-out images, few-shot draws and their folds."""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

import torch
from tyro.conf import Fixed

from ldae.errors import InputError
from ldae.evals.protocol import Protocol
from ldae.tree import COUNT


def held_out(names: list[str], labels: torch.Tensor, one_in: int) -> torch.Tensor:
    """Return which images are held out, bool (N,): one in so many, by the hash of its name alone.

    Raises: InputError when no class has images in both parts.
    """
    held = torch.tensor([int.from_bytes(_digest(name), "big") % one_in == 0 for name in names])
    if not torch.isin(labels[held], labels[~held]).any():
        raise InputError(
            f"{len(names)} train images of {len(labels.unique())} classes are too few to hold out "
            f"one in {one_in}: no class has images in both parts"
        )
    return held


@dataclass(frozen=True)
class FewShotProtocol(Protocol):
    """The constants of few-shot grading."""

    shots: Annotated[tuple[int, ...], COUNT] = ()
    """Numbers of train images a class; each is graded beside all train images."""
    draws: Annotated[int, COUNT] = 5
    """Draws of each number of shots, by --seed; their mean and standard deviation are reported."""
    only_shots: bool = False
    """Grade the draws of ``shots`` alone, without all train images."""
    seed: Fixed[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only_shots and not self.shots:
            raise InputError("--only-shots needs --shots")

    @property
    def accuracies(self) -> tuple[str, ...]:
        """Names of the accuracies of all train images, and of each draw."""
        return ("top1", "top5")

    @property
    def headlines(self) -> tuple[str, ...]:
        names = self.accuracies
        few = (f"{name}_{shots}shot" for shots in self.shots for name in names)
        with_spread = (f"{name}{end}" for name in few for end in ("", "_std"))
        return (*(() if self.only_shots else names), *with_spread)

    @property
    def depends_on_seed(self) -> bool:
        return bool(self.shots)  # the seed draws them


def draw_images(
    names: list[str], labels: torch.Tensor, shots: int, number: int, seed: int
) -> torch.Tensor:
    """Return which images are in draw ``number``, bool (N,): ``shots`` of every class.

    The draw depends on the seed, the number and the names of a class's images, not on their order.
    A draw of fewer shots is a part of a draw of more.
    """
    key = f"{seed}/{number}".encode()
    digests = [blake2b(os.fsencode(name), digest_size=16, key=key).digest() for name in names]
    left, chosen = dict.fromkeys(labels.unique().tolist(), shots), torch.zeros_like(labels).bool()
    for i in sorted(range(len(names)), key=digests.__getitem__):
        label = int(labels[i])
        chosen[i] = left[label] > 0
        left[label] -= 1
    return chosen


def fold_splits(
    names: list[str], labels: torch.Tensor, chosen: torch.Tensor, folds: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Divide the ``chosen`` images of every class into folds, by the hash of their names alone.

    Returns: for each fold, which images are in the other folds and which in this one, bool (N,).
    There are at most as many folds as images of a class, and none for one image a class.
    """
    folds = min(folds, int(labels[chosen].unique(return_counts=True)[1].min()))
    dealt, fold = dict.fromkeys(labels.unique().tolist(), 0), torch.full_like(labels, -1)
    for i in sorted(chosen.nonzero()[:, 0].tolist(), key=lambda i: _digest(names[i])):
        label = int(labels[i])
        fold[i] = dealt[label] % folds
        dealt[label] += 1
    held = [fold == number for number in range(folds if folds > 1 else 0)]
    return [(chosen & ~part, part) for part in held]


def _digest(name: str) -> bytes:
    return blake2b(os.fsencode(name), digest_size=8).digest()


def check_draws(
    protocol: FewShotProtocol,
    labels: torch.Tensor,
    classes: list[str] | None,
    predictions: bool = False,
) -> None:
    """Check that each class has enough train images for the draws.

    Raises: InputError naming the class that has too few, and for ``predictions``, which come from
        all train images, where the protocol leaves these out.
    """
    if predictions and protocol.only_shots:
        raise InputError(
            "predictions are those by all train images: leave out --predictions or --only-shots"
        )
    for label, count in enumerate(torch.bincount(labels).tolist()):
        if 0 < count < max(protocol.shots, default=0):
            name = repr(classes[label]) if classes else label
            raise InputError(
                f"class {name} has {count} train images, fewer than {max(protocol.shots)} shots"
            )


def grade_draws(
    protocol: FewShotProtocol,
    names: list[str],
    labels: torch.Tensor,
    grade: Callable[[torch.Tensor], dict[str, float]],
) -> dict:
    """Grade every draw, and return the mean and the standard deviation over the draws.

    Returns: for a result ``top1`` of ``grade`` and 5 shots: ``top1_5shot``, ``top1_5shot_std``, and
    the values of all draws in ``draws``.
    """
    results: dict = {}
    draws: dict[str, list[float]] = {}
    for shots in protocol.shots:
        graded = [
            grade(draw_images(names, labels, shots, number, protocol.seed))
            for number in range(protocol.draws)
        ]
        for key in graded[0]:
            name, values = f"{key}_{shots}shot", [grades[key] for grades in graded]
            results[name] = statistics.fmean(values)
            results[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
            draws[name] = values
    return results | ({"draws": draws} if draws else {})
