"""Images corrupted after the crop, as they are graded; a table and pictures of the results."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ldae.backbones.preprocessing import EvalTransform
from ldae.data.corruptions import corrupt
from ldae.data.source import Source
from ldae.markdown import markdown_table

Cells = dict[str, dict[int, dict[str, float]]]
"""Corruption -> severity -> top1 and top5 in percent."""


@dataclass(frozen=True)
class CorruptedTransform(EvalTransform):
    """The evaluation transform, followed by a corruption of the uint8 crop (C, H, W).

    The result depends on the image, its index, from which ``rng`` is made, and ``seed``.
    """

    corruption: str
    severity: int
    seed: int

    def __call__(self, image: Image.Image | np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        pixels = super().__call__(image, rng).permute(1, 2, 0).numpy()
        seed = self.seed + int(rng.integers(2**62))
        corrupted = corrupt(pixels, self.corruption, self.severity, seed)
        return torch.from_numpy(np.ascontiguousarray(corrupted.transpose(2, 0, 1)))


def corruption_pictures(
    source: Source,
    index: int,
    transform: EvalTransform,
    transforms: list[list[CorruptedTransform]],
) -> list[torch.Tensor]:
    """Return rows of pictures (n, C, H, W) in [0, 1]: one image clean, then by each of a row."""
    image = source.image(index)

    def picture(by: EvalTransform) -> torch.Tensor:
        return by(image, np.random.default_rng(index)) / 255

    return [torch.stack([picture(by) for by in (transform, *row)]) for row in transforms]


def mean_by_corruption(cells: Cells) -> dict[str, float]:
    """Return the mean top-1 of each corruption over its severities."""
    return {name: float(np.mean([c["top1"] for c in row.values()])) for name, row in cells.items()}


def corruption_table(cells: Cells, clean: float) -> str:
    """Write top-1 in percent as Markdown, with a row a corruption and a column a severity."""
    severities = list(next(iter(cells.values())))
    means = mean_by_corruption(cells)
    rows = {
        name: [*(cell["top1"] for cell in row.values()), means[name]] for name, row in cells.items()
    }
    rows["mean"] = list(np.mean(list(rows.values()), axis=0))
    header = ["top-1", *(f"severity {severity}" for severity in severities), "mean"]
    cells = [
        ["clean", *[""] * len(severities), f"{clean:.2f}"],
        *([name, *(f"{number:.2f}" for number in row)] for name, row in rows.items()),
    ]
    return markdown_table(header, cells)
