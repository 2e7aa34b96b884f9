"""Compare two backbones by the images on which their predictions differ: a paired bootstrap."""

from pathlib import Path

import numpy as np

from ldae.runs import layout


def correct(folder: Path, name: str) -> np.ndarray:
    """Return which images an evaluation classifies right, bool (N,).

    Args:
        folder: an evaluation with predictions.npz.
        name: the prediction, such as ``top1`` or ``k20``.
    """
    with np.load(folder / layout.PREDICTIONS) as kept:
        return kept[name] == kept["labels"]


def bootstrap(
    ours: np.ndarray, theirs: np.ndarray, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two accuracies, in percent points.

    The images are drawn with replacement, each with the results of both.

    Args:
        ours, theirs: how often each image is right, (N,) each.
    """
    rng, difference = np.random.default_rng(seed), ours - theirs
    count = len(difference)
    means = [difference[rng.integers(count, size=count)].mean() for _ in range(draws)]
    low, high = 100 * np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
