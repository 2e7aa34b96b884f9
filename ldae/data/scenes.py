"""Built-in scenes of several digits, with a box, a mask and a class for each."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ldae.data.digits import SPLITS, count_and_seed, glyphs, warn_of_folder
from ldae.data.instances import InstanceSource, Pictures, encode
from ldae.data.source import Splits

SCENES = "digit-scenes"
_TRAIN_IMAGES, _EVAL_IMAGES = 4_000, 500
_CANVAS = 64
_SIZES = (12, 28)  # smallest and largest side of a digit, in pixels
_TRIES = 6  # digits that are tried for a scene; one that hides others too much is left out
_VISIBLE = 0.6  # smallest share of a digit that later ones leave visible


def scene_splits(spec: str) -> Splits:
    """Return functions that open the splits of ``digit-scenes[:N[:SEED]]``.

    Raises: InputError when ``spec`` has another form.
    """
    warn_of_folder(spec)
    count, seed = count_and_seed(spec, _TRAIN_IMAGES)
    return {
        split: functools.partial(DigitScenes, spec, split, images, seed)
        for split, images in zip(SPLITS, (count, _EVAL_IMAGES))
    }


def picture_splits(spec: str) -> Splits:
    """Return functions that open the splits as images without instances, for a pre-training.

    Raises: InputError as ``scene_splits``.
    """
    openers = scene_splits(spec)
    return {split: functools.partial(_open_pictures, openers[split]) for split in openers}


def _open_pictures(opener: Callable[[], InstanceSource]) -> Pictures:
    return Pictures(opener())


class DigitScenes(InstanceSource):
    """One to six digits of random size, brightness and place on a black 64x64 RGB canvas.

    Image i is a pure function of (seed, split, i) and does not depend on ``count``. Later digits
    lie over earlier ones. A mask is the visible part of a digit, and a box lies close around it.
    """

    def __init__(self, spec: str, split: str, count: int, seed: int) -> None:
        names = [str(digit) for digit in range(10)]
        categories = {name: number for number, name in enumerate(names, start=1)}  # as COCO's
        super().__init__(spec, split, categories, has_masks=True)
        self._glyphs, self._digits = glyphs(split)
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return self._count

    def size(self, i: int) -> tuple[int, int]:
        return _CANVAS, _CANVAS

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self._scene(i)[0]).convert("RGB")

    def annotations(self, i: int) -> list[dict[str, Any]]:
        _, masks, digits = self._scene(i)
        return [
            {
                "category_id": self.categories[str(digit)],
                "bbox": _box(mask),
                "area": int(mask.sum()),
                "segmentation": encode(mask),
                "iscrowd": 0,
            }
            for mask, digit in zip(masks, digits)
        ]

    def stamp(self) -> bytes:
        return self._glyphs.tobytes() + repr((self._count, self._seed)).encode()

    def _scene(self, i: int) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
        """Return the canvas, uint8 (64, 64), and the masks, bool (64, 64), and digits on it."""
        rng = np.random.default_rng([self._seed, SPLITS.index(self.split), i])
        canvas = np.zeros((_CANVAS, _CANVAS), np.uint8)
        masks: list[np.ndarray] = []
        whole: list[int] = []  # pixels of each digit before others hid it
        digits: list[int] = []
        for _ in range(rng.integers(1, _TRIES + 1)):
            number = int(rng.integers(len(self._glyphs)))
            ink = _place(self._glyphs[number], rng)
            visible = [mask & (ink == 0) for mask in masks]
            if all(mask.sum() >= _VISIBLE * area for mask, area in zip(visible, whole)):
                canvas = np.where(ink > 0, ink, canvas)
                masks = [*visible, ink > 0]
                whole.append(int((ink > 0).sum()))
                digits.append(int(self._digits[number]))
        return canvas, masks, digits


def _place(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a canvas, uint8 (64, 64), with a glyph of random size, brightness and place."""
    side = int(rng.integers(_SIZES[0], _SIZES[1] + 1))
    left, top = rng.integers(_CANVAS - side + 1, size=2)
    resized = Image.fromarray(glyph).resize((side, side), Image.Resampling.BICUBIC)
    canvas = np.zeros((_CANVAS, _CANVAS), np.uint8)
    canvas[top : top + side, left : left + side] = np.asarray(resized) * rng.uniform(0.4, 1)
    return canvas


def _box(mask: np.ndarray) -> list[int]:
    """Return left, top, width and height of the smallest box around a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
