"""Drawn pictures of the size of ImageNet's photographs, to measure the speed of decoding."""

from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375  # of most photographs in ImageNet
_CLASSES = 10


def write_photos(folder: Path, count: int) -> float:
    """Write JPEGs into a sub-folder for each class; return their average size in bytes."""
    rng, total = np.random.default_rng(0), 0
    for number in range(count):
        path = folder / str(number % _CLASSES) / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_photo(rng).save(path, quality=90)
        total += path.stat().st_size
    return total / count


def draw_photo(rng: np.random.Generator) -> Image.Image:
    """Draw gradients and noise, with less contrast in finer detail, as in photographs."""
    pixels = np.zeros((HEIGHT, WIDTH, 3))
    for cells in (2, 8, 32, 128, 500):
        noise = rng.uniform(0, 255, (cells * HEIGHT // WIDTH + 1, cells, 3)).astype(np.uint8)
        layer = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        pixels += np.asarray(layer, float) / np.sqrt(cells)
    return Image.fromarray((pixels * (255 / pixels.max())).astype(np.uint8))
