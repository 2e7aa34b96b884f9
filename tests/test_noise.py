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


def test_the_cosine_schedule_is_the_equation_up_to_its_largest_beta():
    """Nichol and Dhariwal 2021, equation 17, with betas of at most 0.999."""
    gamma2 = schedule("cosine")[0] ** 2

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (1, 10, 500, 999):
        assert gamma2[t - 1] == pytest.approx(f(t) / f(0))
    assert gamma2[-1] / gamma2[-2] == pytest.approx(0.001)


def test_the_geometric_schedule_multiplies_sigma_by_the_same_factor_from_end_to_end():
    gamma, sigma = noise.geometric(5, min_sigma=0.1, max_sigma=8.1)
    assert sigma.tolist() == pytest.approx([0.1, 0.3, 0.9, 2.7, 8.1]) and (gamma == 1).all()


def test_the_rectified_flow_is_a_straight_line_to_pure_noise():
    gamma, sigma = noise.rectified_flow(4)
    assert sigma.tolist() == [0.25, 0.5, 0.75, 1.0] and gamma.tolist() == [0.75, 0.5, 0.25, 0.0]


def test_a_process_without_input_scaling_is_the_vp_process_rescaled():
    """z_t / sqrt(1 + sigma^2) has gamma^2 = 1 / (1 + sigma^2)."""
    gamma, sigma = schedule("linear_sigma")
    shrink = (1 + sigma**2).rsqrt()
    torch.testing.assert_close((gamma * shrink) ** 2, 1 / (1 + sigma**2))
    torch.testing.assert_close(
        (gamma * shrink) ** 2 + (sigma * shrink) ** 2, torch.ones_like(sigma)
    )


@pytest.mark.parametrize("steps", [1, 8, 50, 1000, 4000])
def test_each_of_the_papers_levels_is_at_its_share_of_a_schedule(steps):
    levels = [noise.level_of_1000(t, steps) for t in range(1000)]
    assert levels == sorted(levels) and levels[0] == 0 and levels[-1] < steps
    assert all(abs(level - t / 1000 * steps) <= 1 for t, level in enumerate(levels))
