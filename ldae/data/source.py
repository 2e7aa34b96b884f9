"""The contract of an image source: images by index, with labels where they are known."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

IGNORED = 255
"""Label of pixels that are neither trained on nor graded."""


class Source:
    """Images by index, with labels where they are known.

    - ``spec`` is the source as the user named it.
    - ``split`` is train, eval, or all when the source has no splits.
    - ``classes`` are the names of the classes, or None when the images are unlabelled.
    - ``labels`` are indices into ``classes``, int64 (N,), or None.

    A source can be pickled, and several processes and threads can read it at once.
    """

    unlabelled = ""
    """Why there are no labels where there could be, as a part of a sentence."""

    latents_of = ""
    """Hash of the tokenizer, when the source gives latents in place of images."""

    def __init__(self, spec: str, split: str, classes: list[str] | None, labels: np.ndarray | None):
        self.spec = spec
        self.split = split
        self.classes = classes
        self.labels = labels

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, i: int) -> str:
        """Return the unique, stable name of image ``i``: its path, or the split and the index."""
        return f"{self.split}/{i:06d}"

    def where(self, i: int) -> str:
        """Return the source and the name of image ``i``, for messages."""
        return f"{self.spec}/{self.name(i)}"

    def paths(self) -> Iterator[bytes]:
        """Yield the path of each image that is a file in a folder, equal in all sources.

        By default, and for images in archives, nothing.
        """
        return iter(())

    def target(self, i: int) -> Any:
        """Return what a model learns of image ``i``: its label, or -1 where there are no labels.

        A subclass may return a tensor, or a tree of tensors in dicts, lists and tuples.
        """
        return -1 if self.labels is None else int(self.labels[i])

    def image(self, i: int) -> Image.Image | np.ndarray:
        """Return image ``i`` in the form that :func:`ldae.data.image.decode` returns.

        An array may have any number of channels.

        Raises: BadImage when the image cannot be read or decoded.
        """
        raise NotImplementedError

    def resizes_twice(self, transform: Callable) -> bool:
        """Return whether ``transform`` may change pixels that were resized before.

        Otherwise the transformed images are those of the original files, byte for byte.
        """
        return False

    def fingerprint(self) -> str:
        """Return the SHA-256 of the images' names and classes and of ``stamp``, in hexadecimal.

        It changes when an image is added, removed, renamed, moved to another class, or replaced as
        far as ``stamp`` shows. It depends neither on the place of the source nor on the numbers of
        the classes, and is the same on all ranks. No image is decoded.
        """
        lines = [self.name(i) for i in range(len(self))]
        if self.classes is not None and self.labels is not None:
            labels = (self.classes[label] for label in self.labels.tolist())
            lines = [f"{name}\0{label}" for name, label in zip(lines, labels, strict=True)]
        digest = hashlib.sha256("\n".join(lines).encode("utf-8", "backslashreplace"))
        digest.update(self.stamp())
        return digest.hexdigest()

    def stamp(self) -> bytes:
        """Return bytes that change when images are replaced under their names, at little cost.

        - Files in a folder: size and time of each file; of more than 100,000 files, only the times
          of their folders, which do not show that a file was overwritten in place.
        - Files in a ZIP archive: size and checksum of each file, from the archive's directory.
        - Files in a tar archive or in shards: size and time of each file, from its header.
        - ``.npz``: size and checksum of each array.
        - Parquet: size and time of each file.
        - ``torch/``: the pixels, or size and time of each file as in a folder; nothing for
          INaturalist.
        - ``hfds/``: the fingerprint that the package datasets computes.
        - Built-in digits: the pixels, and size and place of each scattered digit.

        By default empty, for images that never change.
        """
        return b""


class MapSource(Source):
    """A source with a label map for each image."""

    def label_map(self, i: int) -> np.ndarray:
        """Return the class of each pixel of image ``i``, uint8 (H, W); ``IGNORED`` if unknown.

        Raises: BadImage when the map cannot be read or differs from the image in size.
        """
        raise NotImplementedError


Splits = dict[str, Callable[[], Source]]
"""Functions that open the splits of a source; the keys are train and eval, eval alone, or all."""
