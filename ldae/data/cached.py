"""Sources that read the crops of images, or their latents, from the mapped file of a cache."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldae.data.cache_file import CacheFile, open_cache
from ldae.data.image import BadImage
from ldae.data.source import Source, Splits
from ldae.data.transforms import CropTransform
from ldae.errors import InputError


class CachedSource(Source):
    """Center crops of the images of another source, with its names, classes and fingerprint.

    An image is an array (S, S, C) in the mapped file, whatever its number of channels.

    Raises: InputError when its names or labels are damaged.
    """

    def __init__(self, spec: str, split: str, file: CacheFile):
        if not file.index_is_whole(split):
            raise InputError(f"{file.path} is damaged: its names or labels have another checksum")
        classes = file.splits[split]["classes"]
        labels = None if classes is None else np.array(file.arrays[split]["labels"])
        if classes is not None and not np.isin(labels, np.arange(len(classes))).all():
            raise InputError(f"{file.path} is damaged: a label of {split} is of no class")
        super().__init__(spec, split, classes, labels)
        self._file = file

    @property
    def _arrays(self) -> dict[str, np.ndarray]:
        return self._file.arrays[self.split]

    def __len__(self) -> int:
        return len(self._arrays["bad"])

    def name(self, i: int) -> str:
        first, end = self._arrays["ends"][i : i + 2]
        return self._arrays["names"][first:end].tobytes().decode()

    def image(self, i: int) -> np.ndarray:
        return self._content(i).transpose(1, 2, 0)

    def _content(self, i: int) -> np.ndarray:
        if self._arrays["bad"][i]:
            raise BadImage(f"{self.where(i)} could not be decoded when the cache was written")
        return self._arrays[self._file.content.array][i]

    def fingerprint(self) -> str:
        return self._file.splits[self.split]["fingerprint"]

    def resizes_twice(self, transform: Callable) -> bool:
        side = self._arrays["images"].shape[1:]
        return not (
            isinstance(transform, CropTransform)
            and transform.crop == "center"
            and (transform.in_chans, transform.img_size, transform.img_size) == side
        )


class CachedLatents(CachedSource):
    """Latents of the images of another source, with its names, classes and fingerprint.

    An image is an array, float16 (1 or 2, N, dim), the mean and the log-variance of its posterior.

    Raises: InputError when the file holds crops, or its names or labels are damaged.
    """

    def __init__(self, spec: str, split: str, file: CacheFile):
        if file.content.array != "latents":
            raise InputError(
                f"{file.path} holds images, not latents, which `ldae cache --latents` writes"
            )
        super().__init__(spec, split, file)

    @property
    def facts(self) -> dict[str, Any]:
        """How the latents were made, see ``Content``."""
        return self._file.content.facts

    @property
    def latents_of(self) -> str:
        return self.facts["tokenizer"]

    def image(self, i: int) -> np.ndarray:
        return self._content(i)

    def resizes_twice(self, transform: Callable) -> bool:
        return self.facts["resized_twice"]


def copy_latents(latents: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Return latents in memory of their own; the transform of ``CachedLatents``."""
    return torch.from_numpy(np.array(latents))


def cached_splits(spec: str, path: Path) -> Splits:
    """Return functions that open the splits of the cache of crops at ``path``.

    Raises: InputError as ``open_cache`` does, and when it is a cache of latents.
    """
    file = open_cache(path)
    if file.content.array != "images":
        raise InputError(
            f"{path} holds latents, not images: name it by data.latents, beside the images"
        )
    return {split: partial(CachedSource, spec, split, file) for split in file.splits}
