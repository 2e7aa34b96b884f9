"""Samplers and guidance, as functions of a denoiser: denoise(z_t, t) -> estimate of z_0.

Samplers work for any Gaussian process z_t = gamma_t z_0 + sigma_t eps. All have the same arguments:

    denoise: the estimate of z_0.
    z: z_t at the first of the levels, (B, N, d).
    levels: noise levels to visit, a decreasing subsequence of T - 1, ..., 0.
    gamma, sigma: of all levels, (T,).
    draw: draw(k) returns standard normal noise in the shape of z for the k-th step, k from 1.

They return z_t at the last of the levels, (B, N, d). The denoiser's estimate there is the sample.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch

from ldae.errors import InputError

Tensor = torch.Tensor
Denoise = Callable[[Tensor, Tensor], Tensor]
"""z_t (B, N, d) and t int64 (B,), the same level for all -> z_0 (B, N, d)."""
Draw = Callable[[int], Tensor]


def sub_sequence(top: int, steps: int, spacing: str = "linear") -> list[int]:
    """Return ``steps`` different levels from ``top`` down to 0, or only ``top`` for one step.

    ``linear`` spaces levels evenly. ``quadratic`` spaces them by the square of the step, so that
    they are dense at low noise (Song et al. 2021, DDIM, appendix D.2).

    Raises: InputError when there are fewer levels than steps.
    """
    if steps > top + 1:
        raise InputError(
            f"steps {steps} is more than the {top + 1} noise levels that this run samples from "
            "(noise.steps)"
        )
    if steps == 1:
        return [top]
    power = {"linear": 1, "quadratic": 2}[spacing]
    places = [top * (i / (steps - 1)) ** power for i in range(steps)]
    # Squares that lie closer together than levels take every level, until they are further apart.
    return [max(math.floor(place + 0.5), i) for i, place in enumerate(places)][::-1]


def ddpm(
    denoise: Denoise, z: Tensor, levels: list[int], gamma: Tensor, sigma: Tensor, draw: Draw
) -> Tensor:
    """Sample by DDPM's ancestral steps: each step draws from q(z_s | z_t, z_0).

    For any Gaussian process, with sigma_{t|s}^2 = sigma_t^2 - (gamma_t / gamma_s)^2 sigma_s^2, this
    is a normal distribution with

        mean = (gamma_t sigma_s^2 / gamma_s z_t + gamma_s sigma_{t|s}^2 z_0) / sigma_t^2
        variance = sigma_s^2 sigma_{t|s}^2 / sigma_t^2

    Source: Ho et al. 2020, equations 6 and 7; Kingma et al. 2021, appendix A.
    """
    g, v = gamma.tolist(), sigma.square().tolist()
    for k, (t, s) in enumerate(pairwise(levels), 1):
        z_0 = denoise(z, _timesteps(t, z))
        between = v[t] - (g[t] / g[s]) ** 2 * v[s]
        z = (g[t] / g[s] * v[s] * z + g[s] * between * z_0) / v[t]
        z = z + math.sqrt(max(v[s] * between / v[t], 0)) * draw(k)
    return z


def ddim(
    denoise: Denoise,
    z: Tensor,
    levels: list[int],
    gamma: Tensor,
    sigma: Tensor,
    draw: Draw,
    eta: float = 0.0,
) -> Tensor:
    """Sample by DDIM: each step adds noise of ``eta`` times DDPM's standard deviation.

    eta = 1 is DDPM, and eta = 0 adds no noise.

    Source: Song et al. 2021, equation 12.
    """
    g, sd = gamma.tolist(), sigma.tolist()
    for k, (t, s) in enumerate(pairwise(levels), 1):
        z_0 = denoise(z, _timesteps(t, z))
        eps = (z - g[t] * z_0) / sd[t]
        between = sd[t] ** 2 - (g[t] / g[s] * sd[s]) ** 2
        fresh = eta * sd[s] / sd[t] * math.sqrt(max(between, 0))
        z = g[s] * z_0 + math.sqrt(max(sd[s] ** 2 - fresh**2, 0)) * eps
        if fresh:
            z = z + fresh * draw(k)
    return z


def euler(
    denoise: Denoise, z: Tensor, levels: list[int], gamma: Tensor, sigma: Tensor, draw: Draw
) -> Tensor:
    """Solve the probability-flow ODE by Euler's method.

    Written as dz = z_0 dgamma + eps dsigma, the ODE holds for every process, also at gamma = 0,
    where z / gamma does not exist. A step then equals a step of DDIM with eta = 0.
    """
    for t, s in pairwise(levels):
        z = z + _ode_step(denoise, z, t, t, s, gamma, sigma)
    return z


def heun(
    denoise: Denoise, z: Tensor, levels: list[int], gamma: Tensor, sigma: Tensor, draw: Draw
) -> Tensor:
    """Solve the probability-flow ODE by Heun's second-order method, with two denoiser calls a step.

    A step to sigma = 0, where eps is undefined, is an Euler step.

    Source: with gamma = 1, Karras et al. 2022, algorithm 1 for sigma(t) = t.
    """
    for t, s in pairwise(levels):
        change = _ode_step(denoise, z, t, t, s, gamma, sigma)
        if sigma[s] > 0:
            change = (change + _ode_step(denoise, z + change, s, t, s, gamma, sigma)) / 2
        z = z + change
    return z


def _ode_step(
    denoise: Denoise, z: Tensor, at: int, t: int, s: int, gamma: Tensor, sigma: Tensor
) -> Tensor:
    """Return z_0 dgamma + eps dsigma from t to s, with z_0 and eps estimated from z at ``at``."""
    z_0 = denoise(z, _timesteps(at, z))
    eps = (z - float(gamma[at]) * z_0) / float(sigma[at])
    return float(gamma[s] - gamma[t]) * z_0 + float(sigma[s] - sigma[t]) * eps


def _timesteps(t: int, z: Tensor) -> Tensor:
    return torch.full((len(z),), t, dtype=torch.int64, device=z.device)


def classifier_free(conditional: Denoise, unconditional: Denoise, weight: float) -> Denoise:
    """Return a denoiser with classifier-free guidance (Ho and Salimans 2022).

    Weight 1 is the conditional network, 0 the unconditional network, and above 1 guides. All
    channels of z_0 are guided. At a fixed z_t, eps and the score are affine in z_0, so guiding z_0
    guides them by the same weight.
    """

    def guided(z_t: Tensor, t: Tensor) -> Tensor:
        without = unconditional(z_t, t)
        return without + weight * (conditional(z_t, t) - without)

    return guided


def classifier_guided(
    denoise: Denoise,
    log_likelihood: Callable[[Tensor], Tensor],
    scale: float,
    gamma: Tensor,
    sigma: Tensor,
) -> Denoise:
    """Return a denoiser with classifier guidance, for a classifier of the estimated clean latents.

    It returns z_0 + scale sigma_t^2 / gamma_t grad log p(y | z_0(z_t)). The gradient is with
    respect to z_t and goes through the denoiser. By Tweedie's formula this is E[z_0 | z_t, y] when
    the likelihood is p(y | z_t). At gamma_t = 0, z_t does not depend on z_0, and there is no
    guidance.

    Args:
        log_likelihood: log p(y | z_0) of the requested classes y, (B, N, d) -> (B,).

    Source: Dhariwal and Nichol 2021, algorithm 2.
    """

    def guided(z_t: Tensor, t: Tensor) -> Tensor:
        g, v = float(gamma[t[0]]), float(sigma[t[0]]) ** 2
        with torch.enable_grad():
            z_t = z_t.detach().requires_grad_()
            z_0 = denoise(z_t, t)
            (gradient,) = torch.autograd.grad(log_likelihood(z_0).sum(), z_t)
        return z_0.detach() + (scale * v / g * gradient if g else 0)

    return guided


SAMPLERS: dict[str, Callable] = {"ddim": ddim, "ddpm": ddpm, "euler": euler, "heun": heun}
