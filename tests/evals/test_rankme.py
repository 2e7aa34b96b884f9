"""RankMe and the spread of features."""

import math

import pytest
import torch

from ldae.evals.rankme import rankme, spread


def test_rankme_counts_equal_singular_values_and_not_their_size():
    q, _ = torch.linalg.qr(torch.randn(40, 7, generator=torch.Generator().manual_seed(0)))
    assert rankme(q) == pytest.approx(7, rel=1e-4)
    assert rankme(1000 * q) == pytest.approx(rankme(q), rel=1e-6)
    assert rankme(torch.outer(torch.arange(1.0, 9.0), torch.ones(5))) == pytest.approx(1, abs=1e-4)


def test_rankme_is_the_exponential_of_the_entropy():
    shares = [0.5, 0.25, 0.125, 0.125]
    entropy = -sum(share * math.log(share) for share in shares)
    assert rankme(torch.diag(torch.tensor(shares))) == pytest.approx(math.exp(entropy), rel=1e-4)


def test_spread_is_0_for_equal_directions_and_1_for_isotropic_features():
    assert spread(torch.outer(torch.arange(1.0, 9.0), torch.ones(5))) == pytest.approx(0, abs=1e-6)
    noise = torch.randn(4000, 50, generator=torch.Generator().manual_seed(0))
    assert spread(noise) == pytest.approx(1, abs=0.02)
    assert spread(7 * noise) == pytest.approx(spread(noise))
    assert 0.05 < spread(noise + 10) < 0.2
    axes = torch.eye(5)
    assert spread(torch.cat([axes, -axes])) == pytest.approx(1)  # also of few features


@pytest.mark.parametrize("measure", [rankme, spread])
def test_features_that_are_not_finite_are_worth_nothing(measure):
    assert measure(torch.tensor([[1.0, 2.0], [math.nan, 1.0]])) == 0
    assert measure(torch.zeros(3, 2)) == pytest.approx(measure(torch.ones(3, 2)), abs=1e-4)
