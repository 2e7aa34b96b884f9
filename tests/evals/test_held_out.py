"""The held-out images depend on the names of images, and on nothing else."""

import pytest
import torch

from ldae.errors import InputError
from ldae.evals.subsets import held_out


def test_held_out_images_depend_on_names_only():
    names = [f"{i}.jpg" for i in range(5000)]
    labels = torch.arange(5000) % 7
    held = held_out(names, labels, 10)
    backwards = held_out(names[::-1], labels.flip(0), 10)
    assert torch.equal(backwards.flip(0), held)
    assert 0.08 < held.double().mean() < 0.12
    assert held_out(["\udcff.jpg", *names], labels[[0, *range(5000)]], 10)[1:].equal(held)


def test_the_split_never_changes():
    names = [f"{i}.jpg" for i in range(60)]
    held = held_out(names, torch.zeros(60, dtype=torch.int64), 10)
    assert held.nonzero()[:, 0].tolist() == [6, 7, 9, 22, 34, 47, 48, 56]


@pytest.mark.parametrize(("count", "classes"), [(1, 1), (2, 2), (60, 60)])
def test_too_few_images_to_hold_out_are_refused(count, classes):
    names = [str(i) for i in range(count)]
    with pytest.raises(InputError, match=f"{count} train images of {classes} classes are too few"):
        held_out(names, torch.arange(count) % classes, 10)
