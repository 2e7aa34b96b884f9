"""Built-in data, made from scikit-learn's 8x8 digits: no download, no disk."""

import functools

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from ldae.data.source import MapSource, Source

_SPLITS = ("train", "eval")
_CANVAS = 32
_SIZES = (14, 24)  # side of a digit, in pixels, both included


@functools.cache
def _samples(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of one split, uint8 (N, 8, 8), and their labels (N,): every fourth is for eval."""
    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    chosen = (np.arange(len(images)) % 4 == 3) == (split == "eval")
    return images[chosen], data.target[chosen].astype(np.int64)


class Digits(Source):
    """The digits as they are: 8x8, grey, 1348 for training and 449 for evaluation."""

    def __init__(self, spec: str, split: str):
        self._images, labels = _samples(split)
        super().__init__(spec, split, [str(digit) for digit in range(10)], labels)

    def __len__(self) -> int:
        return len(self._images)

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self._images[i])


class ScatteredDigits(MapSource):
    """One digit of random size at a random place on a black 32x32 RGB canvas.

    Image i is a pure function of (seed, split, i), whatever ``count`` is. Place and size vary so
    much that a linear classifier on raw pixels is weak, while the class stays plain to see. Its label
    map is 1 + the digit where the canvas is not black.
    """

    def __init__(self, spec: str, split: str, count: int, seed: int):
        self._images, labels = _samples(split)
        rng = np.random.default_rng([seed, _SPLITS.index(split)])
        # Uniform numbers come one after the other, so row i does not depend on the rows after it.
        sample, size, *place = rng.random((count, 4)).T
        self._sample = (sample * len(self._images)).astype(np.int64)
        self._size = _SIZES[0] + (size * (_SIZES[1] - _SIZES[0] + 1)).astype(np.int64)
        self._left, self._top = (np.stack(place) * (_CANVAS - self._size + 1)).astype(np.int64)
        super().__init__(spec, split, [str(d) for d in range(10)], labels[self._sample])

    def __len__(self) -> int:
        return len(self._sample)

    def image(self, i: int) -> Image.Image:
        return self._canvas(i).convert("RGB")

    def label_map(self, i: int) -> np.ndarray:
        return (np.asarray(self._canvas(i)) > 0) * np.uint8(1 + self.labels[i])

    def _canvas(self, i: int) -> Image.Image:
        side = int(self._size[i])
        digit = Image.fromarray(self._images[self._sample[i]])
        digit = digit.resize((side, side), Image.Resampling.BICUBIC)
        canvas = Image.new("L", (_CANVAS, _CANVAS))
        canvas.paste(digit, (int(self._left[i]), int(self._top[i])))
        return canvas
