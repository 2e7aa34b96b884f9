"""Ranks agree with sorting, and nothing undefined counts as right."""

import pytest
import torch

from ldae.evals.accuracy import UNRANKED, best_label_ranks, label_ranks, top1_top5


def test_rank_is_the_position_in_a_stable_sort():
    scores = torch.randint(0, 4, (200, 6), generator=torch.Generator().manual_seed(0)).float()
    labels = torch.arange(200) % 6
    order = scores.sort(dim=1, descending=True, stable=True).indices.tolist()
    assert label_ranks(scores, labels).tolist() == [
        o.index(c) for o, c in zip(order, labels.tolist())
    ]


def test_undefined_scores_and_unknown_classes_are_never_right():
    scores = torch.tensor([[torch.nan, torch.nan], [1.0, 0.0]])
    assert (label_ranks(scores, torch.tensor([0, 7])) >= 5).all()


def test_the_best_of_several_right_classes_counts():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.1, 0.9, 0.5, 0.2], [0.1, 0.9, 0.5, 0.2]])
    labels = torch.tensor([[0, 2], [3, -1], [-1, -1]])
    assert best_label_ranks(scores, labels).tolist() == [1, 2, UNRANKED]


def test_top1_and_top5_count_batches_by_their_indices():
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(23, 9, generator=generator), torch.arange(23) % 9
    order = torch.randperm(23, generator=generator)
    placed = label_ranks(scores, labels)
    for size in (1, 7, 256):
        batches = [(scores[part], part) for part in order.split(size)]
        found = top1_top5(batches, labels[:, None], 23, torch.device("cpu"))
        assert found == pytest.approx(
            {f"top{n}": 100 / 23 * int((placed < n).sum()) for n in (1, 5)}
        )
