"""Ranks agree with sorting, and nothing undefined counts as right."""

import torch

from ldae.evals.accuracy import ranks, top


def test_rank_is_the_place_in_a_stable_sort():
    scores = torch.randint(0, 4, (200, 6), generator=torch.Generator().manual_seed(0)).float()
    labels = torch.arange(200) % 6
    order = scores.sort(dim=1, descending=True, stable=True).indices.tolist()
    assert ranks(scores, labels).tolist() == [o.index(c) for o, c in zip(order, labels.tolist())]


def test_undefined_scores_and_unknown_classes_are_never_right():
    scores = torch.tensor([[torch.nan, torch.nan], [1.0, 0.0]])
    assert top(ranks(scores, torch.tensor([0, 7])), 5) == 0


def test_top_counts_in_percent():
    placed = torch.tensor([0, 1, 4, 5])
    assert (top(placed, 1), top(placed, 5)) == (25.0, 75.0)
