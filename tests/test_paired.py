import numpy as np
import pytest

from benchmarks.paired import bootstrap, correct
from ldae.runs import layout


def test_the_interval_is_that_of_the_normal_approximation():
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(2_000) < 0.7, rng.random(2_000) < 0.6
    difference = ours.astype(float) - theirs
    half = 1.96 * difference.std() / len(difference) ** 0.5
    low, high = bootstrap(ours.astype(float), theirs.astype(float))
    assert (low, high) == pytest.approx(
        (100 * (difference.mean() - half), 100 * (difference.mean() + half)), abs=0.15
    )


def test_images_keep_both_results():
    """Backbones that are wrong on the same images differ by nothing, in every draw."""
    right = np.random.default_rng(0).random(100)
    assert bootstrap(right, right) == (0, 0)
    low, high = bootstrap(right, right - 0.25)
    assert (low, high) == pytest.approx((25, 25))


def test_correct_compares_with_the_labels(tmp_path):
    np.savez(tmp_path / layout.PREDICTIONS, labels=[0, 1, 2], k20=[0, 2, 2], top1=[0, 1, 2])
    assert correct(tmp_path, "k20").tolist() == [True, False, True]
    assert correct(tmp_path, "top1").all()
