"""Images by index, with the labels that are known."""

import numpy as np
from PIL import Image


class Source:
    """Images by index, with the labels that are known.

    ``spec`` is what the user wrote; ``split`` is train, eval, or all where there are no splits;
    ``classes`` are names, or None; ``labels`` are int64 (N,) into ``classes``, or None.
    A source can be pickled, and read by several processes and threads at once.
    """

    def __init__(self, spec: str, split: str, classes: list[str] | None, labels: np.ndarray | None):
        self.spec = spec
        self.split = split
        self.classes = classes
        self.labels = labels

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, i: int) -> str:
        """The name of image ``i``, unique and stable: a path in the source, or split and number."""
        return f"{self.split}/{i:06d}"

    def where(self, i: int) -> str:
        """Image ``i`` as messages call it."""
        return f"{self.spec}/{self.name(i)}"

    def image(self, i: int) -> Image.Image | np.ndarray:
        """Image ``i``, as :func:`ldae.data.image.decode` returns it.

        Raises: BadImage when it can not be read or decoded.
        """
        raise NotImplementedError


IGNORED = 255
"""The label of pixels that nothing is learned from, and that are not graded."""


class MapSource(Source):
    """A source with a label map for each image."""

    def label_map(self, i: int) -> np.ndarray:
        """The class of every pixel of image ``i``, uint8 (H, W), ``IGNORED`` where it is not known.

        Raises: BadImage when it can not be read, or is not of the image's size.
        """
        raise NotImplementedError
