"""Prediction types: what a network can predict from z_t = gamma z_0 + sigma eps."""

from collections.abc import Callable
from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Prediction(NamedTuple):
    """A prediction type. Given z_t, every type is an affine map of every other one."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(z_0, eps, gamma, sigma) -> the target of the prediction."""
    clean: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(prediction, z_t, gamma, sigma) -> z_0."""


PREDICTIONS = {
    "latent": Prediction(  # z_0 itself, also called x0
        lambda z_0, eps, gamma, sigma: z_0,
        lambda p, z_t, gamma, sigma: p,
    ),
    "eps": Prediction(  # the noise (Ho et al. 2020); does not determine z_0 at gamma = 0
        lambda z_0, eps, gamma, sigma: eps,
        lambda p, z_t, gamma, sigma: (z_t - sigma * p) / gamma,
    ),
    "v": Prediction(  # Salimans and Ho 2022
        lambda z_0, eps, gamma, sigma: gamma * eps - sigma * z_0,
        lambda p, z_t, gamma, sigma: (gamma * z_t - sigma * p) / (gamma**2 + sigma**2),
    ),
    "score": Prediction(  # the gradient of log p(z_t | z_0); undefined at sigma = 0
        lambda z_0, eps, gamma, sigma: -eps / sigma,
        lambda p, z_t, gamma, sigma: (z_t + sigma**2 * p) / gamma,
    ),
    "velocity": Prediction(  # d z_t / dt of the rectified flow (Liu et al. 2023)
        lambda z_0, eps, gamma, sigma: eps - z_0,
        lambda p, z_t, gamma, sigma: (z_t - sigma * p) / (gamma + sigma),
    ),
}
