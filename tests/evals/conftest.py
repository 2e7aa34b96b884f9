"""Small labelled images, and features, that a test makes itself."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldae.data.sources import Source
from ldae.evals.features import Features


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


@pytest.fixture
def cloud():
    """cloud(count, seed): features of classes that overlap."""

    def make(count: int, seed: int, classes: int = 4, dim: int = 8) -> Features:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(classes, (count,), generator=generator)
        noise = 3 + 0.7 * torch.randn(count, dim, generator=generator)
        names = [f"{seed}/{i}" for i in range(count)]
        return Features(noise + torch.eye(classes, dim)[labels], labels, names)

    return make
