"""Samplers with the exact denoiser of distributions for which z_t is known in closed form."""

import math
from dataclasses import asdict
from inspect import signature

import pytest
import torch

from ldae import noise, prediction
from ldae.errors import InputError
from ldae.sampling import samplers
from ldae.settings import NoiseSettings

# Weight, mean and variance of each component: apart, and of different shapes.
MIXTURE = ((0.7, -1.0, 0.04), (0.3, 1.5, 0.25))
GAUSSIAN = ((1.0, 0.4, 0.36),)
SCHEDULES = [
    name for name, schedule in noise.SCHEDULES.items() if "steps" in signature(schedule).parameters
]
# Settings of a schedule for which the defaults do not suit the tests below.
SETTINGS = {"geometric": {"max_sigma": 50.0}}
SAMPLERS = {name: (sampler, {}) for name, sampler in samplers.SAMPLERS.items()} | {
    "ddim-half": (samplers.ddim, {"eta": 0.5})
}


def levels_of(name, steps=1000):
    return noise.levels(**asdict(NoiseSettings(name, steps, **SETTINGS.get(name, {}))))


def exact(parts, gamma, sigma):
    """Return the denoiser E[z_0 | z_t] of a mixture of Gaussians, for each number by itself."""

    def denoise(z_t, t):
        g, v = gamma[t][:, None, None], sigma[t][:, None, None] ** 2
        logs, means = [], []
        for weight, mean, variance in parts:
            total = g**2 * variance + v
            away = z_t - g * mean
            logs.append(math.log(weight) - total.log() / 2 - away**2 / (2 * total))
            means.append(mean + g * variance / total * away)
        return (torch.stack(logs).softmax(0) * torch.stack(means)).sum(0)

    return denoise


def draws(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda k: torch.randn(shape, generator=generator, dtype=torch.float64)


def start(parts, gamma, sigma, shape):
    """Draw from the exact distribution of z_t."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.tensor([part[0] for part in parts], dtype=torch.float64)
    chosen = torch.multinomial(weights, math.prod(shape), True, generator=generator).reshape(shape)
    mean, variance = (torch.tensor([p[i] for p in parts], dtype=torch.float64) for i in (1, 2))
    normals = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return gamma * (mean[chosen] + variance[chosen].sqrt() * normals[0]) + sigma * normals[1]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samplers_reach_the_moments_and_weights_of_a_mixture(schedule, name):
    gamma, sigma = levels_of(schedule)
    levels = samplers.sub_sequence(999, 200)
    shape = (6000, 1, 1)
    sampler, how = SAMPLERS[name]
    if gamma[-1] ** 2 > 1e-2 * sigma[-1] ** 2:  # the top level is not pure noise
        z = start(MIXTURE, gamma[-1], sigma[-1], shape)
    else:
        z = sigma[-1] * draws(shape, seed=1)(0)
    z = sampler(exact(MIXTURE, gamma, sigma), z, levels, gamma, sigma, draws(shape), **how)
    mean = sum(w * m for w, m, _ in MIXTURE)
    variance = sum(w * (v + (m - mean) ** 2) for w, m, v in MIXTURE)
    g, v = float(gamma[0]), float(sigma[0]) ** 2
    assert float(z.mean()) == pytest.approx(g * mean, abs=0.06)
    assert float(z.var()) == pytest.approx(g**2 * variance + v, rel=0.05)
    right = z > 0.2  # 1e-3 of each component is on the other side
    assert float(right.double().mean()) == pytest.approx(0.3, abs=0.02)
    for chosen, (_, m, own) in zip((z[~right], z[right]), MIXTURE, strict=True):
        assert float(chosen.mean()) == pytest.approx(g * m, abs=0.04)
        assert float(chosen.var()) == pytest.approx(g**2 * own + v, rel=0.15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_eta_1_is_ddpm(schedule):
    """Over all T steps, with the same noise."""
    gamma, sigma = levels_of(schedule)
    shape, levels = (16, 2, 3), list(range(999, -1, -1))
    z = sigma[-1] * draws(shape, seed=1)(0)
    given = (exact(MIXTURE, gamma, sigma), z, levels, gamma, sigma)
    ancestral = samplers.ddpm(*given, draws(shape))
    torch.testing.assert_close(
        samplers.ddim(*given, draws(shape), eta=1.0), ancestral, rtol=1e-9, atol=1e-9
    )
    other = samplers.ddim(*given, draws(shape), eta=0.99)
    assert (other - ancestral).abs().max() > 1e-3


@pytest.mark.parametrize("t, s", [(999, 700), (500, 499), (40, 0)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_steps_draw_from_the_posterior(schedule, t, s):
    """Compared to conditioning the joint normal of z_s and z_t, z_s with noise added."""
    gamma, sigma = levels_of(schedule)
    z_0, z_t = 0.3, -0.8
    ratio = gamma[t] / gamma[s]
    joint = torch.stack([
        torch.stack([sigma[s] ** 2, ratio * sigma[s] ** 2]),
        torch.stack([ratio * sigma[s] ** 2, sigma[t] ** 2]),
    ])  # fmt: skip
    gain = joint[0, 1] / joint[1, 1]
    mean = gamma[s] * z_0 + gain * (z_t - gamma[t] * z_0)
    std = (joint[0, 0] - gain * joint[0, 1]).clamp(min=0).sqrt()
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    for number in (0.0, 1.0):
        actual = samplers.ddpm(
            lambda z, _: z_0 * one, z_t * one, [t, s], gamma, sigma, lambda k: number * one
        )
        assert float(actual) == pytest.approx(float(mean + number * std), rel=1e-9, abs=1e-12)


def test_each_step_draws_its_own_noise():
    gamma, sigma = levels_of("ddpm")
    drawn = []

    def draw(k):
        drawn.append(k)
        return torch.zeros(2, 1, 1, dtype=torch.float64)

    denoise = exact(MIXTURE, gamma, sigma)
    z = torch.ones(2, 1, 1, dtype=torch.float64)
    samplers.ddpm(denoise, z, [999, 400, 20, 0], gamma, sigma, draw)
    assert drawn == [1, 2, 3]
    drawn.clear()
    samplers.ddim(denoise, z, [999, 400, 20, 0], gamma, sigma, draw)
    assert drawn == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_without_noise_converges_to_the_ode(schedule):
    """For a Gaussian the ODE keeps (z_t - gamma_t m) / sd(z_t), so its solution is known."""
    gamma, sigma = levels_of(schedule)
    _, mean, variance = GAUSSIAN[0]
    deviation = (gamma**2 * variance + sigma**2).sqrt()
    z = gamma[-1] * mean + deviation[-1] * torch.linspace(-2, 2, 9).double()[:, None, None]
    expected = gamma[0] * mean + deviation[0] / deviation[-1] * (z - gamma[-1] * mean)
    errors = []
    for steps in (50, 500):
        levels = samplers.sub_sequence(999, steps)
        actual = samplers.ddim(
            exact(GAUSSIAN, gamma, sigma), z, levels, gamma, sigma, draws(z.shape)
        )
        errors.append(float((actual - expected).abs().max()))
    assert errors[1] < 0.015 and errors[1] < errors[0] / 5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_euler_equals_ddim_without_noise(schedule):
    gamma, sigma = levels_of(schedule)
    z = draws((8, 2, 3), seed=1)(0)
    given = (exact(MIXTURE, gamma, sigma), z, samplers.sub_sequence(999, 20), gamma, sigma)
    torch.testing.assert_close(
        samplers.euler(*given, draws(z.shape)), samplers.ddim(*given, draws(z.shape))
    )


@pytest.mark.parametrize("sampler, order", [(samplers.euler, 1), (samplers.heun, 2)])
@pytest.mark.parametrize("process", ["vp", "ve", "flow", "from gamma = 0"])
def test_global_error_has_the_order_of_the_method(process, sampler, order):
    """The slope of log error over log step, away from sigma = 0, against a fine reference."""

    def path(steps):
        time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        angle = 0.35 + 1.0 * time
        return {
            "vp": (angle.cos(), angle.sin()),
            "ve": (torch.ones_like(time), 0.4 + 2.6 * time**2),
            "flow": (0.75 - 0.6 * time, 0.25 + 0.6 * time),
            "from gamma = 0": (0.8 - 0.8 * time, 0.2 + 0.8 * time),
        }[process]

    # Smooth enough that the asymptotic order shows at these steps.
    parts = ((0.6, -0.7, 0.3), (0.4, 0.9, 0.5))
    z = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None, None]

    def solve(solver, steps):
        gamma, sigma = path(steps)
        levels = list(range(steps, -1, -1))
        return solver(exact(parts, gamma, sigma), z, levels, gamma, sigma, None)

    reference = solve(samplers.heun, 4000)
    counts = (40, 80, 160, 320)
    errors = [float((solve(sampler, n) - reference).abs().max()) for n in counts]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert slopes == pytest.approx([order] * 3, abs=0.15)


def test_heun_takes_an_euler_step_to_sigma_0():
    gamma, sigma = levels_of("linear_sigma")
    denoise = exact(MIXTURE, gamma, sigma)
    z = draws((4, 1, 1))(0)
    actual = samplers.heun(denoise, z, [30, 0], gamma, sigma, None)
    assert sigma[0] == 0
    torch.testing.assert_close(actual, denoise(z, torch.full((4,), 30)))


@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
def test_sub_sequences_decrease_from_top_to_0(spacing):
    for top in (0, 1, 7, 99, 998):
        for steps in {1, 2, 3, 5, 50, top // 2, top, top + 1} - {0}:
            if steps > top + 1:
                continue
            levels = samplers.sub_sequence(top, steps, spacing)
            assert len(levels) == steps and levels[0] == top
            assert all(a > b for a, b in zip(levels, levels[1:]))
            assert levels[-1] == (0 if steps > 1 else top)
    assert samplers.sub_sequence(100, 5, spacing) == {
        "linear": [100, 75, 50, 25, 0], "quadratic": [100, 56, 25, 6, 0]
    }[spacing]  # fmt: skip


def test_more_steps_than_levels_are_refused():
    with pytest.raises(InputError, match=r"steps 11 .* 10 noise levels .*noise.steps"):
        samplers.sub_sequence(9, 11)


@pytest.mark.parametrize("name", ["eps", "score", "v"])
def test_guiding_z_0_equals_guiding_the_prediction(name):
    """This holds for every prediction type and every channel."""
    gamma, sigma = levels_of("ddpm")
    t = torch.full((3,), 600)
    z_t, *outputs = (draws((3, 4, 5), seed)(0) for seed in (1, 2, 3))
    level = gamma[600], sigma[600]
    clean = prediction.PREDICTIONS[name].clean
    with_label, without = (lambda z, _, p=p: clean(p, z, *level) for p in outputs)
    actual = samplers.classifier_free(with_label, without, 2.5)(z_t, t)
    mixed = outputs[1] + 2.5 * (outputs[0] - outputs[1])
    torch.testing.assert_close(actual, clean(mixed, z_t, *level))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_classifier_guidance_gives_the_conditional_mean(schedule):
    """With normal z_0 and y = a z_0 + noise, E[z_0 | z_t, y] is known in closed form."""
    gamma, sigma = levels_of(schedule)
    variance, a, r, y, t = 0.36, 1.7, 0.5, 2.0, 300
    g, v = float(gamma[t]), float(sigma[t]) ** 2
    posterior = 1 / (1 / variance + g**2 / v)  # of z_0, given z_t

    def log_likelihood(z_0):
        """log p(y | z_t), which depends on z_t only through E[z_0 | z_t]."""
        return -((y - a * z_0) ** 2 / (2 * (r**2 + a**2 * posterior))).sum((1, 2))

    denoise = exact(((1.0, 0.0, variance),), gamma, sigma)
    z_t = draws((5, 2, 3))(0)
    guided = samplers.classifier_guided(denoise, log_likelihood, 1.0, gamma, sigma)
    precision = 1 / variance + g**2 / v + a**2 / r**2
    expected = (g / v * z_t + a / r**2 * y) / precision
    actual = guided(z_t, torch.full((5,), t))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert not actual.requires_grad


def test_there_is_no_classifier_guidance_at_gamma_0():
    gamma, sigma = levels_of("linear_gamma2")
    denoise = exact(MIXTURE, gamma, sigma)
    guided = samplers.classifier_guided(denoise, lambda z: z.sum((1, 2)), 1.0, gamma, sigma)
    z, t = draws((2, 1, 1))(0), torch.full((2,), 999)
    assert torch.equal(guided(z, t), denoise(z, t))
