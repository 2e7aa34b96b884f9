"""The built-in data sets, made from scikit-learn's 8x8 digits without a download."""

import functools
import logging
import os
import re

import numpy as np
from PIL import Image

from ldae.data.source import MapSource, Source, Splits
from ldae.errors import InputError

BUILT_IN = ("digits", "scattered-digits")
SPLITS = ("train", "eval")
_TRAIN_IMAGES, _EVAL_IMAGES = 20_000, 5_000  # of scattered-digits
_CANVAS = 32
_SIZES = (14, 24)  # smallest and largest side of a scattered digit, in pixels
_log = logging.getLogger(__name__)


def built_in_splits(spec: str) -> Splits:
    """Return functions that open the splits of ``digits`` or ``scattered-digits[:N[:SEED]]``.

    Raises: InputError when ``spec`` has another form.
    """
    warn_of_folder(spec)
    if spec == "digits":
        return {split: functools.partial(Digits, spec, split) for split in SPLITS}
    if spec.startswith("digits"):
        raise InputError(f"{spec!r} is neither digits nor scattered-digits[:N[:SEED]]")
    count, seed = count_and_seed(spec, _TRAIN_IMAGES)
    return {
        split: functools.partial(ScatteredDigits, spec, split, images, seed)
        for split, images in zip(SPLITS, (count, _EVAL_IMAGES))
    }


def warn_of_folder(spec: str) -> None:
    """Warn when a folder has the name of the built-in data set ``spec``, which is used instead."""
    if os.path.isdir(spec):
        _log.warning("%s is the built-in data set: the folder of that name is ./%s", spec, spec)


def count_and_seed(spec: str, default: int) -> tuple[int, int]:
    """Return N, by default ``default``, and SEED, by default 0, of ``NAME[:N[:SEED]]``.

    Raises: InputError when ``spec`` has another form.
    """
    name = spec.partition(":")[0]
    numbers = re.fullmatch(rf"{name}(?::(\d*[1-9]\d*)(?::(\d+))?)?", spec, re.ASCII)
    if not numbers:
        raise InputError(f"{spec!r} is not {name}[:N[:SEED]] with N >= 1")
    return int(numbers[1] or default), int(numbers[2] or 0)


@functools.cache
def glyphs(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of one split, uint8 (N, 8, 8), and their labels, int64 (N,).

    Every fourth digit belongs to the eval split.
    """
    from sklearn.datasets import load_digits  # the import takes a second

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    chosen = (np.arange(len(images)) % 4 == 3) == (split == "eval")
    return images[chosen], data.target[chosen].astype(np.int64)


class Digits(Source):
    """scikit-learn's grey 8x8 digits: 1348 for training and 449 for evaluation."""

    def __init__(self, spec: str, split: str):
        self._images, labels = glyphs(split)
        super().__init__(spec, split, [str(digit) for digit in range(10)], labels)

    def __len__(self) -> int:
        return len(self._images)

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self._images[i])

    def stamp(self) -> bytes:
        return self._images.tobytes()


class ScatteredDigits(MapSource):
    """One digit of random size at a random place on a black 32x32 RGB canvas.

    Image i is a pure function of (seed, split, i) and does not depend on ``count``. The place and
    the size vary so much that a linear classifier on raw pixels is weak, although the digit is easy
    to see. A label map is 1 + the digit where the canvas is not black, and 0 elsewhere.
    """

    def __init__(self, spec: str, split: str, count: int, seed: int):
        self._images, labels = glyphs(split)
        rng = np.random.default_rng([seed, SPLITS.index(split)])
        # The generator fills row after row, so row i does not depend on the number of rows.
        sample, size, *place = rng.random((count, 4)).T
        self._sample = (sample * len(self._images)).astype(np.int64)
        self._size = _SIZES[0] + (size * (_SIZES[1] - _SIZES[0] + 1)).astype(np.int64)
        self._left, self._top = (np.stack(place) * (_CANVAS - self._size + 1)).astype(np.int64)
        super().__init__(spec, split, [str(digit) for digit in range(10)], labels[self._sample])

    def __len__(self) -> int:
        return len(self._sample)

    def image(self, i: int) -> Image.Image:
        return self._canvas(i).convert("RGB")

    def label_map(self, i: int) -> np.ndarray:
        return (np.asarray(self._canvas(i)) > 0) * np.uint8(1 + self.labels[i])

    def stamp(self) -> bytes:
        arrays = (self._images, self._sample, self._size, self._left, self._top)
        return b"".join(array.tobytes() for array in arrays)

    def _canvas(self, i: int) -> Image.Image:
        side = int(self._size[i])
        digit = Image.fromarray(self._images[self._sample[i]])
        digit = digit.resize((side, side), Image.Resampling.BICUBIC)
        canvas = Image.new("L", (_CANVAS, _CANVAS))
        canvas.paste(digit, (int(self._left[i]), int(self._top[i])))
        return canvas
