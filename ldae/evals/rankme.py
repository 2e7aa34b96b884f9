"""The effective rank and the spread of features, which need no labels."""

import torch

_EPS = 1e-7  # RankMe's


def rankme(features: torch.Tensor) -> float:
    """Return RankMe, the effective rank of features (N, D): 1 to min(N, D).

    It is the exponential of the entropy of the singular values, as shares of their sum. It is 1
    when all features are multiples of one vector, and 0 when one of them is not finite.

    Source: Garrido et al. 2023, RankMe, equation 1.
    """
    if not features.isfinite().all():
        return 0.0
    values = torch.linalg.svdvals(features.double().cpu())
    shares = values / values.sum().clamp(min=_EPS) + _EPS
    return torch.special.entr(shares).sum().exp().item()


def spread(features: torch.Tensor) -> float:
    """Return the spread of features (N, D): about 1 for isotropic ones, and 0 if all are equal.

    Each feature is divided by its norm. The spread is the standard deviation of each dimension,
    averaged over the dimensions and times sqrt(D). It is 0 when a feature is not finite.

    Source: Chen and He 2021, SimSiam, section 4.1.
    """
    if not features.isfinite().all():
        return 0.0
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return unit.std(0, correction=0).mean().item() * features.shape[1] ** 0.5
