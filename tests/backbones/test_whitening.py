"""Whitened features are uncorrelated, and shrinkage leads from there to features as they are."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.covariance import shrunk_covariance

from ldae.backbones.whitening import whitening
from ldae.errors import InputError
from ldae.moments import Moments


def correlated(count: int, dim: int = 6) -> torch.Tensor:
    """Features with a mean, and standard deviations from 1 to 100 in mixed directions."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(dim, dim, generator=generator) * torch.logspace(0, 2, dim)[:, None]
    return torch.randn(count, dim, generator=generator) @ mixed + 10


def moments_of(features: torch.Tensor) -> Moments:
    moments = Moments(features.shape[1])
    for rows in features.double().split(70):
        moments.update(rows)
    return moments


def test_whitened_features_have_identity_covariance():
    features = correlated(500)
    whitened = whitening(moments_of(features), shrinkage=0)(features).double()
    torch.testing.assert_close(whitened.mean(0), torch.zeros(6).double(), atol=1e-4, rtol=0)
    covariance = whitened.T.cov(correction=0)
    torch.testing.assert_close(covariance, torch.eye(6).double(), atol=1e-3, rtol=0)


def test_shrinkage_is_that_of_scikit_learn():
    features = correlated(500)
    for shrinkage in (0.01, 0.5):
        weight = whitening(moments_of(features), shrinkage).weight.double()
        covariance = features.double().T.cov(correction=0).numpy()
        expected = torch.from_numpy(shrunk_covariance(covariance, shrinkage))
        torch.testing.assert_close((weight @ weight).inverse(), expected, rtol=1e-3, atol=0.1)


def test_full_shrinkage_only_subtracts_the_mean():
    features = correlated(500)
    whitened = whitening(moments_of(features), shrinkage=1)(features)
    torch.testing.assert_close(F.normalize(whitened), F.normalize(features - features.mean(0)))


def test_directions_without_variance_need_shrinkage():
    features = correlated(4)  # in 6 dimensions
    assert whitening(moments_of(features), shrinkage=1e-4)(features).isfinite().all()
    with pytest.raises(InputError, match="4 images vary in 3 of 6 .* whiten_shrinkage 0: give"):
        whitening(moments_of(features), shrinkage=0)
    with pytest.raises(InputError, match="vary in 0 of 6 dimensions"):
        whitening(moments_of(torch.ones(5, 6)))
