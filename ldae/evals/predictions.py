"""The predicted class of each evaluation image, in a file beside results.json."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ldae import files
from ldae.data.source import Source
from ldae.distributed import all_reduce_sum, is_main, rank, world_size
from ldae.evals.features import Features, image_names, known_labels
from ldae.runs import layout

_ROWS_AT_ONCE = 1024
_NO_PREDICTIONS = ("names", "labels", "classes")  # in a file of predictions


class Predictions:
    """The classes that graders predict for the images of a source, by the name of the prediction.

    Each rank adds the predictions for its share of the images.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.device = source, device
        self.classes: dict[str, torch.Tensor] = {}

    def add(self, name: str, positions: torch.Tensor, scores: torch.Tensor) -> None:
        """Add the class of the highest score for some images.

        Of equal scores the smaller class counts. Scores that are not a number do not count, and -1
        stands for an image without any other.

        Args:
            positions: int64 (B,), positions of the images in this rank's share.
            scores: (B, C).
        """
        if name not in self.classes:
            self.classes[name] = torch.zeros(len(self.source), dtype=torch.int64)
        numbers = torch.arange(scores.shape[1], device=scores.device)
        # A class that was not learned has no score, and one that is not a number counts as none.
        known = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        highest = (known == known.amax(1, keepdim=True)) & ~scores.isnan()
        first = torch.where(highest, numbers, scores.shape[1]).amin(1)
        first = first.masked_fill(first == scores.shape[1], -1)
        self.classes[name][positions * world_size() + rank()] = first.cpu()

    @torch.inference_mode()
    def classify(
        self, name: str, classifier: Callable[[torch.Tensor], torch.Tensor], share: Features
    ) -> None:
        """Add the classes of a classifier, (B, D) -> (B, 1, C), for this rank's share."""
        for rows in torch.arange(len(share.labels)).split(_ROWS_AT_ONCE):
            scores = classifier(share.features[rows].to(self.device))[:, 0]
            self.add(name, rows, scores)

    def save(self, folder: Path) -> None:
        """Write the predictions of all ranks to ``predictions.npz`` in a folder.

        The file holds the ``names`` of the images, their ``labels``, the names of the ``classes``
        and, under its name, each prediction: int64 (N,).
        """
        joined = {
            name: all_reduce_sum(classes.to(self.device)).cpu().numpy()
            for name, classes in self.classes.items()
        }
        if is_main():
            content = io.BytesIO()
            np.savez_compressed(
                content,
                names=np.array(image_names(self.source)),
                labels=known_labels(self.source).numpy(),
                classes=np.array(self.source.classes or ()),
                **joined,
            )
            folder.mkdir(parents=True, exist_ok=True)
            files.write(folder / layout.PREDICTIONS, content.getvalue())


def count_changed(before: Path, after: Path) -> dict[str, tuple[int, int]]:
    """Count the images of which two predictions differ.

    Args:
        before: a folder with ``predictions.npz``, or without.
        after: another one.

    Returns: by the name of the prediction, the number of images with another class and of all
    images; {} if a folder has no predictions, or those of other images.
    """
    paths = [folder / layout.PREDICTIONS for folder in (before, after)]
    if not all(path.is_file() for path in paths):
        return {}
    with np.load(paths[0], allow_pickle=False) as one, np.load(paths[1], allow_pickle=False) as two:
        if not np.array_equal(one["names"], two["names"]):
            return {}
        found = [name for name in one if name not in _NO_PREDICTIONS and name in two]
        return {name: (int((one[name] != two[name]).sum()), len(one[name])) for name in found}
