"""A draw belongs to the names of images, and to nothing else."""

import pytest
import torch

from ldae.errors import InputError
from ldae.evals.subsets import DrawsProtocol, check_shots, drawn, few_shot

NAMES = [f"{i}.jpg" for i in range(300)]
LABELS = torch.arange(300) % 4


def test_draw_has_so_many_of_each_class_whatever_the_order():
    chosen = drawn(NAMES, LABELS, 6, 0, 0)
    assert torch.bincount(LABELS[chosen]).tolist() == [6, 6, 6, 6]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    shuffled = drawn([NAMES[i] for i in order], LABELS[order], 6, 0, 0)
    assert torch.equal(shuffled, chosen[order])


def test_draws_differ_and_fewer_shots_are_among_more():
    draws = [drawn(NAMES, LABELS, 6, *key) for key in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(draw.tolist()) for draw in draws}) == 3
    assert not (drawn(NAMES, LABELS, 2, 0, 0) & ~draws[0]).any()


def test_draw_is_the_same_for_ever():
    found = drawn([*NAMES[:39], "\udcff.jpg"], LABELS[:40], 2, 1, 0)
    assert found.nonzero()[:, 0].tolist() == [5, 11, 18, 24, 29, 32, 35, 38]


def test_one_draw_has_no_spread():
    found = few_shot(DrawsProtocol((2,), 1), NAMES, LABELS, lambda chosen: {"n": chosen.sum()})
    assert (found["n_2shot"], found["n_2shot_std"]) == (8, 0)


def test_class_with_too_few_images_is_named():
    with pytest.raises(InputError, match="class 'b' has 2 train images, fewer than 3 shots"):
        check_shots(DrawsProtocol((1, 3)), torch.tensor([0, 0, 0, 1, 1, 3, 3, 3]), [*"abcd"])
