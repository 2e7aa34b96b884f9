"""Corruptions are the same in any batch, order and process; the table shows every cell."""

import numpy as np
import pytest
import torch

from ldae.backbones.preprocessing import EvalTransform
from ldae.data.corruptions import corrupt
from ldae.data.loader import eval_batches
from ldae.evals.corrupted import (
    CorruptedTransform,
    corruption_pictures,
    corruption_table,
    mean_by_corruption,
)

PLAIN = {
    "input_size": (3, 16, 16), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
    "mean": (0.5,) * 3, "std": (0.5,) * 3,
}  # fmt: skip


def corrupted(name: str = "impulse_noise", severity: int = 5, seed: int = 0) -> CorruptedTransform:
    return CorruptedTransform(**PLAIN, corruption=name, severity=severity, seed=seed)


def seen(source, transform, indices, batch_size, workers=0) -> dict[int, torch.Tensor]:
    batches = eval_batches(source, transform, indices, batch_size, workers)
    return {int(i): x for images, _, numbers in batches for i, x in zip(numbers, images)}


def test_corruptions_do_not_depend_on_batch_order_or_process(pictures):
    source = pictures(23)
    wanted = seen(source, corrupted(), range(23), 23)
    order = np.random.default_rng(0).permutation(23)
    for batch_size, workers in ((1, 0), (7, 2)):
        again = seen(source, corrupted(), order, batch_size, workers)
        assert all(torch.equal(again[i], wanted[i]) for i in range(23))
    assert seen(source, corrupted(), [5], 1)[5].equal(wanted[5])  # alone, too
    clean = seen(source, EvalTransform(**PLAIN), range(23), 23)
    masks = torch.stack([(wanted[i] != clean[i]).flatten() for i in range(23)])
    assert len(masks.unique(dim=0)) == 23  # each image its own noise
    assert not seen(source, corrupted(seed=1), [5], 1)[5].equal(wanted[5])


def test_the_crop_is_corrupted(pictures):
    source = pictures(1)
    big = PLAIN | {"input_size": (3, 8, 8)}
    clean = EvalTransform(**big)(source.image(0), np.random.default_rng(0))
    made = CorruptedTransform(**big, corruption="contrast", severity=5, seed=0)
    wanted = corrupt(clean.permute(1, 2, 0).numpy(), "contrast", 5, 0)
    found = made(source.image(0), np.random.default_rng(0))
    assert (found.permute(1, 2, 0).numpy() == wanted).all() and found.dtype == torch.uint8
    assert torch.equal(made.normalize(found[None]), EvalTransform(**big).normalize(found[None]))


def test_pictures_show_the_clean_image_first(pictures):
    source = pictures(3)
    rows = corruption_pictures(
        source,
        2,
        EvalTransform(**PLAIN),
        [[corrupted("fog", s) for s in (1, 5)], [corrupted()] * 2],
    )
    assert [row.shape for row in rows] == [(3, 3, 16, 16)] * 2
    clean = np.asarray(source.image(2)).transpose(2, 0, 1) / 255
    assert all(np.allclose(row[0], clean) for row in rows)
    graded = seen(source, corrupted(), [2], 1)[2]
    assert torch.equal(rows[1][1], graded / 255)


def test_the_table_shows_every_cell_and_the_means():
    cells = {
        "fog": {1: {"top1": 80.0, "top5": 1.0}, 5: {"top1": 40.0, "top5": 1.0}},
        "snow": {1: {"top1": 60.0, "top5": 1.0}, 5: {"top1": 21.0, "top5": 1.0}},
    }
    assert mean_by_corruption(cells) == pytest.approx({"fog": 60, "snow": 40.5})
    assert corruption_table(cells, 91.234).splitlines() == [
        "| top-1 | severity 1 | severity 5 | mean |",
        "| --- | --: | --: | --: |",
        "| clean |  |  | 91.23 |",
        "| fog | 80.00 | 40.00 | 60.00 |",
        "| snow | 60.00 | 21.00 | 40.50 |",
        "| mean | 70.00 | 30.50 | 50.25 |",
    ]
