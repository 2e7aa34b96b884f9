"""Small labelled images that a test makes itself."""

import numpy as np
import pytest
from PIL import Image

from ldae.data.sources import Source


class Pictures(Source):
    """Noise around a grey level that tells the class."""

    def __init__(self, count: int, split: str = "train", classes: int = 3, seed: int = 0):
        rng = np.random.default_rng(seed)
        labels = np.arange(count, dtype=np.int64) % classes
        super().__init__("pictures", split, [f"class-{c}" for c in range(classes)], labels)
        levels = 60 + 60 * labels[:, None, None, None]
        noise = rng.integers(-60, 61, (count, 16, 16, 3))
        self.pixels = (levels + noise).clip(0, 255).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, i: int) -> str:
        return f"{self.split}/{i}.png"

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i])


@pytest.fixture
def pictures():
    return Pictures
