"""Prediction types are affine maps of one another."""

from dataclasses import asdict

import pytest
import torch

from ldae import noise
from ldae.prediction import PREDICTIONS
from ldae.settings import NoiseSettings


def levels(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gamma and sigma (T, 1) of a schedule, without levels at which one of them is 0."""
    gamma, sigma = noise.levels(**asdict(NoiseSettings(name, steps=100, max_sigma=3.0)))
    inside = (gamma > 0) & (sigma > 0)
    return gamma[inside, None], sigma[inside, None]


def corrupted(gamma: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    z_0, eps = torch.randn(2, len(gamma), 5, generator=generator, dtype=torch.float64)
    return z_0, eps, gamma * z_0 + sigma * eps


@pytest.mark.parametrize("schedule", noise.SCHEDULES)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_every_prediction_determines_z_0_and_eps(name, schedule):
    gamma, sigma = levels(schedule)
    z_0, eps, z_t = corrupted(gamma, sigma)
    target = PREDICTIONS[name].target(z_0, eps, gamma, sigma)
    clean = PREDICTIONS[name].clean(target, z_t, gamma, sigma)
    torch.testing.assert_close(clean, z_0, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close((z_t - gamma * clean) / sigma, eps, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_z_0_is_affine_in_the_prediction(name):
    """Therefore guidance extrapolates predictions and their z_0 in the same way."""
    gamma, sigma = levels("cosine")
    p, q, z_t = corrupted(gamma, sigma)
    clean = PREDICTIONS[name].clean
    actual = clean(3 * p - 2 * q, z_t, gamma, sigma)
    expected = 3 * clean(p, z_t, gamma, sigma) - 2 * clean(q, z_t, gamma, sigma)
    torch.testing.assert_close(actual, expected)


def test_the_score_is_the_gradient_of_the_log_density():
    gamma, sigma = levels("cosine")
    z_0, eps, z_t = corrupted(gamma, sigma)
    z_t = z_t.requires_grad_()
    (-((z_t - gamma * z_0) ** 2) / (2 * sigma**2)).sum().backward()
    torch.testing.assert_close(PREDICTIONS["score"].target(z_0, eps, gamma, sigma), z_t.grad)


def test_v_and_the_velocity_are_the_time_derivatives_of_their_processes():
    """v for gamma = cos and sigma = sin; the velocity for gamma = 1 - s and sigma = s."""
    z_0, eps = torch.tensor([0.7], dtype=torch.float64), torch.tensor([-1.3], dtype=torch.float64)
    time = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    (time.cos() * z_0 + time.sin() * eps).backward()
    actual = PREDICTIONS["v"].target(z_0, eps, time.cos(), time.sin())
    torch.testing.assert_close(actual, time.grad, check_dtype=True)
    time.grad = None
    ((1 - time) * z_0 + time * eps).backward()
    actual = PREDICTIONS["velocity"].target(z_0, eps, 1 - time, time)
    torch.testing.assert_close(actual, time.grad)
