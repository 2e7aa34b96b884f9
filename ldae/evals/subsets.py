"""Parts of train: the held-out part that chooses, and few-shot draws."""

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
    """Which images choose, bool (N,), one in so many: a pure function of each image's name.

    Raises: InputError when there are none, or none of a class that is left to learn from.
    """
    digests = (blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    held = torch.tensor([int.from_bytes(digest, "big") % one_in == 0 for digest in digests])
    if not torch.isin(labels[held], labels[~held]).any():
        raise InputError(
            f"{len(names)} train images of {len(labels.unique())} classes are too few to hold "
            f"one in {one_in} out: no class has images in both parts"
        )
    return held


@dataclass(frozen=True)
class DrawsProtocol(Protocol):
    """The constants of what is learned from few images."""

    shots: Annotated[tuple[int, ...], COUNT] = ()
    """Numbers of train images of each class, each graded beside all of train."""
    draws: Annotated[int, COUNT] = 5
    """Draws of each number of shots, by --seed; their mean and standard deviation are reported."""
    seed: Fixed[int] = 0

    @property
    def accuracies(self) -> tuple[str, ...]:
        """Names of the accuracies that are reported of all of train and of each draw."""
        return ("top1", "top5")

    @property
    def headlines(self) -> tuple[str, ...]:
        few = (f"{name}_{shots}shot" for shots in self.shots for name in self.accuracies)
        return (*self.accuracies, *(f"{name}{end}" for name in few for end in ("", "_std")))


def drawn(
    names: list[str], labels: torch.Tensor, shots: int, number: int, seed: int
) -> torch.Tensor:
    """Which images are in draw ``number``, bool (N,): ``shots`` of every class.

    A pure function of the seed, the number and the names of a class's images, whatever their order;
    the images of fewer shots are among those of more.

    Raises: InputError when a class has fewer images.
    """
    key = f"{seed}/{number}".encode()
    digests = [blake2b(os.fsencode(name), digest_size=16, key=key).digest() for name in names]
    left, chosen = dict.fromkeys(labels.unique().tolist(), shots), torch.zeros_like(labels).bool()
    for i in sorted(range(len(names)), key=digests.__getitem__):
        label = int(labels[i])
        chosen[i] = left[label] > 0
        left[label] -= 1
    return chosen


def check_shots(protocol: DrawsProtocol, labels: torch.Tensor, classes: list[str] | None) -> None:
    """Raises: InputError, naming the class, when one has fewer train images than are drawn."""
    for label, count in enumerate(torch.bincount(labels).tolist()):
        if 0 < count < max(protocol.shots, default=0):
            name = repr(classes[label]) if classes else label
            raise InputError(
                f"class {name} has {count} train images, fewer than {max(protocol.shots)} shots"
            )


def few_shot(
    protocol: DrawsProtocol,
    names: list[str],
    labels: torch.Tensor,
    grade: Callable[[torch.Tensor], dict[str, float]],
) -> dict:
    """The mean and the spread over draws of what ``grade`` finds for the images of a draw.

    Returns: for ``top1``, say: ``top1_5shot``, ``top1_5shot_std``, and each draw's in ``draws``.
    """
    results: dict = {}
    every: dict[str, list[float]] = {}
    for shots in protocol.shots:
        found = [
            grade(drawn(names, labels, shots, number, protocol.seed))
            for number in range(protocol.draws)
        ]
        for name in found[0]:
            values = [one[name] for one in found]
            results[f"{name}_{shots}shot"] = statistics.fmean(values)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            results[f"{name}_{shots}shot_std"] = spread
            every[f"{name}_{shots}shot"] = values
    return results | ({"draws": every} if every else {})
