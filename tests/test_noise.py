import math
from dataclasses import asdict
from inspect import signature

import pytest
import torch

from ldae import noise
from ldae.settings import NoiseSettings

VARIANCE_PRESERVING = ("ddpm", "cosine", "linear_gamma2")


def schedule(name, steps=1000):
    return noise.levels(**asdict(NoiseSettings(name, steps)))


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_gamma2_and_sigma2_sum_to_one(name):
    gamma, sigma = schedule(name)
    torch.testing.assert_close(gamma**2 + sigma**2, torch.ones_like(gamma))


@pytest.mark.parametrize("name", noise.SCHEDULES)
def test_the_signal_to_noise_ratio_falls(name):
    """A schedule has ``steps`` levels, or one if it does not take ``steps``."""
    for steps in (7, 1000):
        gamma, sigma = schedule(name, steps)
        expected = steps if "steps" in signature(noise.SCHEDULES[name]).parameters else 1
        assert gamma.shape == sigma.shape == (expected,) and gamma.dtype == torch.float64
        assert (gamma >= 0).all() and (sigma >= 0).all() and (gamma**2 + sigma**2 > 0).all()
        assert ((gamma / sigma).diff() < 0).all()


def test_the_ends_of_the_schedules():
    gamma, _ = schedule("linear_gamma2")
    assert gamma[-1] == 0 and gamma[0] ** 2 == pytest.approx(0.999)
    gamma, sigma = schedule("linear_sigma")
    assert sigma[0] == 0 and sigma[-1] == pytest.approx(math.sqrt(2)) and (gamma == 1).all()
    gamma, sigma = schedule("single")
    assert gamma.tolist() == [1.0] and sigma.tolist() == [pytest.approx(math.sqrt(1 / 3))]
    gamma, _ = schedule("ddpm")
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    assert gamma[-1] ** 2 == pytest.approx(math.prod(1 - beta for beta in betas))


def test_a_process_without_input_scaling_is_the_vp_process_rescaled():
    """z_t / sqrt(1 + sigma^2) has gamma^2 = 1 / (1 + sigma^2)."""
    gamma, sigma = schedule("linear_sigma")
    shrink = (1 + sigma**2).rsqrt()
    torch.testing.assert_close((gamma * shrink) ** 2, 1 / (1 + sigma**2))
    torch.testing.assert_close(
        (gamma * shrink) ** 2 + (sigma * shrink) ** 2, torch.ones_like(sigma)
    )
