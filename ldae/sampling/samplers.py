"""Samplers and guidance: free functions over one contract, denoise(z_t, t) -> z_0 hat.

Every sampler takes any Gaussian process z_t = gamma_t z_0 + sigma_t eps, ``gamma`` and ``sigma``
being (T,), and walks down ``levels``, a falling sub-sequence of 0 .. T - 1: from z at the first it
returns z at the last. What the network sees there is the sample.

``draw(k)`` is standard normal noise like z for the k-th move, from 1 on.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch

from ldae.errors import InputError

Tensor = torch.Tensor
Denoise = Callable[[Tensor, Tensor], Tensor]
"""z_t (B, N, d) and t int64 (B,), one level for all -> z_0 (B, N, d)."""


Draw = Callable[[int], Tensor]


def sub_sequence(top: int, steps: int, spacing: str = "linear") -> list[int]:
    """``steps`` different levels from ``top`` down to 0; a single step is ``top`` alone.

    ``linear`` spaces them evenly, ``quadratic`` with the square of the step, so that they are dense
    at low noise (Song et al. 2021, DDIM, appendix D.2).

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
    # Where squares lie closer than levels do, every level is taken, until they have caught up.
    return [max(math.floor(place + 0.5), i) for i, place in enumerate(places)][::-1]


def ddpm(
    denoise: Denoise, z: Tensor, levels: list[int], gamma: Tensor, sigma: Tensor, draw: Draw
) -> Tensor:
    """Ancestral sampling: each move draws from q(z_s | z_t, z_0) (Ho et al. 2020, eq. 6 and 7).

    That is, for any process: with sigma_{t|s}^2 = sigma_t^2 - (gamma_t / gamma_s)^2 sigma_s^2, a
    normal of mean (gamma_t sigma_s^2 / gamma_s z_t + gamma_s sigma_{t|s}^2 z_0) / sigma_t^2 and
    variance sigma_s^2 sigma_{t|s}^2 / sigma_t^2 (Kingma et al. 2021, appendix A).
    """
    g, v = gamma.tolist(), sigma.square().tolist()
    for k, (t, s) in enumerate(pairwise(levels), 1):
        z_0 = denoise(z, _at(t, z))
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
    """DDIM (Song et al. 2021, eq. 12): ``eta`` times the standard deviation of DDPM's posterior.

    So eta = 1 is DDPM, and eta = 0 draws no noise.
    """
    g, sd = gamma.tolist(), sigma.tolist()
    for k, (t, s) in enumerate(pairwise(levels), 1):
        z_0 = denoise(z, _at(t, z))
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
    """The probability-flow ODE by Euler's steps.

    Written dz = z_0 dgamma + eps dsigma, it holds for every process, also at gamma = 0, where
    z / gamma does not exist. A step is then that of DDIM with eta = 0.
    """
    for t, s in pairwise(levels):
        z = z + _change(denoise, z, t, t, s, gamma, sigma)
    return z


def heun(
    denoise: Denoise, z: Tensor, levels: list[int], gamma: Tensor, sigma: Tensor, draw: Draw
) -> Tensor:
    """The same ODE by Heun's steps of second order, two calls of the network each.

    With gamma = 1 this is Karras et al. 2022, algorithm 1 with sigma(t) = t; as there, a step to
    sigma = 0, where eps is undefined, is one of Euler's.
    """
    for t, s in pairwise(levels):
        change = _change(denoise, z, t, t, s, gamma, sigma)
        if sigma[s] > 0:
            change = (change + _change(denoise, z + change, s, t, s, gamma, sigma)) / 2
        z = z + change
    return z


def _change(
    denoise: Denoise, z: Tensor, at: int, t: int, s: int, gamma: Tensor, sigma: Tensor
) -> Tensor:
    """z_0 dgamma + eps dsigma from t to s, z_0 and eps being those of z at ``at``."""
    z_0 = denoise(z, _at(at, z))
    eps = (z - float(gamma[at]) * z_0) / float(sigma[at])
    return float(gamma[s] - gamma[t]) * z_0 + float(sigma[s] - sigma[t]) * eps


def _at(t: int, z: Tensor) -> Tensor:
    return torch.full((len(z),), t, dtype=torch.int64, device=z.device)


def classifier_free(conditional: Denoise, unconditional: Denoise, weight: float) -> Denoise:
    """Ho and Salimans 2022: 1 is the conditional network, 0 the other, above 1 guides.

    All of z_0 is guided. At a fixed z_t, eps and score are affine in it, so it is theirs too.
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
    """Dhariwal and Nichol 2021, algorithm 2, with a classifier of the predicted clean latents.

    ``log_likelihood`` is log p(y | z_0), (B, N, d) -> (B,), y being what is asked for. Its gradient
    is taken in z_t, through the network: z_0 + scale sigma_t^2 / gamma_t grad log p(y | z_0(z_t)).
    By Tweedie's formula that is E[z_0 | z_t, y], if the likelihood is that of z_t. At gamma_t = 0,
    where z_t says nothing of z_0, there is no guidance.
    """

    def guided(z_t: Tensor, t: Tensor) -> Tensor:
        g, v = float(gamma[t[0]]), float(sigma[t[0]]) ** 2
        with torch.enable_grad():
            z_t = z_t.detach().requires_grad_()
            z_0 = denoise(z_t, t)
            (slope,) = torch.autograd.grad(log_likelihood(z_0).sum(), z_t)
        return z_0.detach() + (scale * v / g * slope if g else 0)

    return guided


SAMPLERS: dict[str, Callable] = {"ddim": ddim, "ddpm": ddpm, "euler": euler, "heun": heun}
