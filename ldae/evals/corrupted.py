"""Corrupted copies of any images, made after the crop, as they are graded; their table and picture."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ldae.backbones.preprocessing import EvalTransform
from ldae.data.corruptions import corrupt
from ldae.data.source import Source

Cells = dict[str, dict[int, dict[str, float]]]
"""Corruption -> severity -> top1 and top5 in percent."""


@dataclass(frozen=True)
class CorruptedTransform(EvalTransform):
    """The evaluation transform, then a corruption of the uint8 crop (C, H, W).

    It is a function of the image and its index in the source, by ``rng``, and of ``seed``.
    """

    corruption: str
    severity: int
    seed: int

    def __call__(self, image: Image.Image | np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        pixels = super().__call__(image, rng).permute(1, 2, 0).numpy()
        seed = self.seed + int(rng.integers(2**62))
        corrupted = corrupt(pixels, self.corruption, self.severity, seed)
        return torch.from_numpy(np.ascontiguousarray(corrupted.transpose(2, 0, 1)))


def album(
    source: Source,
    index: int,
    transform: EvalTransform,
    transforms: list[list[CorruptedTransform]],
) -> list[torch.Tensor]:
    """Rows of pictures (n, C, H, W) in [0, 1]: one image, clean and then as each of a row sees it."""
    image = source.image(index)

    def seen(by: EvalTransform) -> torch.Tensor:
        return by(image, np.random.default_rng(index)) / 255

    clean = seen(transform)
    return [torch.stack([clean, *(seen(one) for one in row)]) for row in transforms]


def means(cells: Cells) -> dict[str, float]:
    """The mean top-1 of each corruption over its severities."""
    return {name: float(np.mean([c["top1"] for c in row.values()])) for name, row in cells.items()}


def table(cells: Cells, clean: float) -> str:
    """Top-1 in percent as Markdown: a row for each corruption, a column for each severity."""
    severities = list(next(iter(cells.values())))
    head = ["top-1", *(f"severity {severity}" for severity in severities), "mean"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines.append(["clean", *[""] * len(severities), f"{clean:.2f}"])
    mean = means(cells)
    for name, row in cells.items():
        numbers = [*(cell["top1"] for cell in row.values()), mean[name]]
        lines.append([name, *(f"{number:.2f}" for number in numbers)])
    columns = [
        np.mean([row[severity]["top1"] for row in cells.values()]) for severity in severities
    ]
    numbers = [*columns, np.mean(list(mean.values()))]
    lines.append(["mean", *(f"{number:.2f}" for number in numbers)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
