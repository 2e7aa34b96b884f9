"""Noise schedules, and random draws that depend on an image's position in the run alone."""

import math
from collections.abc import Callable

import torch

from ldae.tree import taken_by

# Philox 4x32, 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

# Streams: the fourth word of the counter separates the draws for one image. From SAMPLING on, each
# step of a sampler has a stream.
NOISE, _TIMESTEP, _LABEL, POSTERIOR, SAMPLING = range(5)
MASK = _WORD

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


def normal(
    seed: int, positions: torch.Tensor, shape: tuple[int, ...], stream: int = NOISE
) -> torch.Tensor:
    """Return standard normal noise, float32 (B, *shape), for int64 positions (B,).

    A draw depends on the seed, the stream and its position alone: not on the rest of the batch, the
    rank, the device, or whether the run was interrupted. Stream ``SAMPLING + i`` belongs to step i
    of a sampler.
    """
    count = math.prod(shape)
    words = _philox(seed, positions, -(-count // 4), stream)  # (B, blocks, 4)
    uniform = (words.float() + 0.5) * 2**-32
    # Box-Muller: two uniforms give two normals. Half a step off zero keeps the logarithm finite.
    radius = torch.sqrt(-2 * torch.log(uniform[..., :2]))
    angle = 2 * math.pi * uniform[..., 2:]
    normals = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return normals.flatten(1)[:, :count].reshape(-1, *shape)


def timesteps(
    seed: int, positions: torch.Tensor, steps: int, clean_share: float = 0.0
) -> torch.Tensor:
    """Return t, int64 (B,), for positions (B,): uniform in 0 .. steps - 1.

    A share ``clean_share`` of the images has t = 0 instead.
    """
    level, coin = _philox(seed, positions, 1, _TIMESTEP)[:, 0, :2].unbind(1)
    return (level * steps >> 32).masked_fill(coin < clean_share * 2**32, 0)


def labels(seed: int, positions: torch.Tensor, count: int) -> torch.Tensor:
    """Return labels, uniform in 0 .. count - 1, int64 (B,), for sample numbers (B,)."""
    return _philox(seed, positions, 1, _LABEL)[:, 0, 0] * count >> 32


def dropped_labels(seed: int, positions: torch.Tensor, probability: float) -> torch.Tensor:
    """Return whether each label is dropped, bool (B,), for positions (B,)."""
    return _philox(seed, positions, 1, _LABEL)[:, 0, 0] < probability * 2**32


def random_words(seed: int, positions: torch.Tensor, count: int, stream: int) -> torch.Tensor:
    """Return random 32-bit words, int64 (B, count), for positions (B,).

    A draw depends on the seed, the stream and its position alone, as in ``normal``.
    """
    return _philox(seed, positions, -(-count // 4), stream).flatten(1)[:, :count]


def _philox(seed: int, positions: torch.Tensor, blocks: int, stream: int) -> torch.Tensor:
    """Return random 32-bit words, int64 (B, blocks, 4), for positions (B,)."""
    block = torch.arange(blocks, device=positions.device)
    position = positions[:, None].expand(-1, blocks)
    counter = (block.expand_as(position), position & _WORD, position >> 32, stream)
    key = (seed & _WORD, seed >> 32 & _WORD)
    return torch.stack(philox_rounds(counter, key), dim=-1)


def philox_rounds(counter: tuple, key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Apply ten rounds of Philox 4x32 to four int64 tensors of unsigned 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps at 64 bits, which leaves its two 32-bit halves right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD,
            (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD,
        )  # fmt: skip
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3
