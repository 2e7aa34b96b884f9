"""Noise schedules: gamma and sigma at each noise level."""

import math
from collections.abc import Callable

import torch

from ldae.tree import taken_by

Levels = tuple[torch.Tensor, torch.Tensor]
"""gamma and sigma at t = 0 .. T - 1, float64 (T,) each."""


def levels(schedule: str, **settings: float) -> Levels:
    """Return gamma and sigma at every level of a schedule, a key of ``SCHEDULES``.

    The schedule gets those of the noise settings that are its parameters.
    """
    function = SCHEDULES[schedule]
    return function(**taken_by(function, settings))


def level_of_1000(t: int, steps: int) -> int:
    """Return the t of a schedule of ``steps`` levels at the same share as t of the paper's 1000."""
    return min(round(t / 1000 * steps), steps - 1)


def feature_timestep(steps: int) -> int:
    """Return the t of a backbone's features: 10 of 1000, or the same share of another schedule.

    Source: paper, appendix; it is the best t with clean input.
    """
    return level_of_1000(10, steps)


def ddpm(steps: int) -> Levels:
    """Let beta rise linearly from 1e-4 to 0.02 (Ho et al. 2020)."""
    return _preserving((1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)).cumprod(0))


def cosine(steps: int) -> Levels:
    """Let gamma fall as a cosine, with betas of at most 0.999 (Nichol and Dhariwal 2021)."""
    ends = torch.arange(steps + 1, dtype=torch.float64) / steps
    bar = torch.cos((ends + 0.008) / 1.008 * math.pi / 2) ** 2
    return _preserving((bar[1:] / bar[:-1]).clamp(min=0.001).cumprod(0))


def linear_gamma2(steps: int) -> Levels:
    """Let gamma^2 fall linearly: gamma_t^2 = 1 - (t + 1) / T (paper, section 4.1)."""
    return _preserving(1 - _time(steps))


def linear_sigma(steps: int, max_sigma: float) -> Levels:
    """Keep gamma = 1 and let sigma rise linearly from 0 to max_sigma (paper, section 4.3)."""
    return _unscaled(torch.linspace(0, max_sigma, steps, dtype=torch.float64))


def geometric(steps: int, min_sigma: float, max_sigma: float) -> Levels:
    """Keep gamma = 1 and let sigma rise geometrically from min_sigma to max_sigma.

    Source: the variance-exploding process of Song et al. 2021.
    """
    low, high = torch.tensor([min_sigma, max_sigma], dtype=torch.float64).log().tolist()
    return _unscaled(torch.linspace(low, high, steps, dtype=torch.float64).exp())


def single(single_sigma: float) -> Levels:
    """Keep one level, gamma = 1 and sigma = single_sigma (paper, row 14)."""
    return _unscaled(torch.tensor([single_sigma], dtype=torch.float64))


def rectified_flow(steps: int) -> Levels:
    """Let sigma_t = (t + 1) / T and gamma_t = 1 - sigma_t (Liu et al. 2023)."""
    return 1 - _time(steps), _time(steps)


def _time(steps: int) -> torch.Tensor:
    """Return (t + 1) / T for t = 0 .. T - 1."""
    return torch.arange(1, steps + 1, dtype=torch.float64) / steps


def _preserving(gamma2: torch.Tensor) -> Levels:
    """Return gamma and sigma with gamma^2 + sigma^2 = 1."""
    return gamma2.sqrt(), (1 - gamma2).sqrt()


def _unscaled(sigma: torch.Tensor) -> Levels:
    """Return gamma = 1 and ``sigma``."""
    return torch.ones_like(sigma), sigma


SCHEDULES: dict[str, Callable[..., Levels]] = {
    function.__name__: function
    for function in (
        ddpm, cosine, linear_gamma2, linear_sigma, geometric, single, rectified_flow,
    )
}  # fmt: skip
"""The noise schedules by name.

The parameters of a schedule are the settings that it reads. Without ``steps`` it has one level.
"""
