"""gamma_t and sigma_t of every schedule, and noise that is a function of the image's number."""

import math

import torch

# Philox 4x32, 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

# The fourth word of the counter separates what is drawn for one image.
NOISE, _TIMESTEP, _LABEL, POSTERIOR, SAMPLING = range(5)


def schedule(
    name: str, steps: int, max_sigma: float, single_sigma: float, min_sigma: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """gamma and sigma of t = 0 .. T - 1, two float64 tensors of shape (T,).

    ``ddpm``: beta linear from 1e-4 to 0.02 (Ho et al. 2020).
    ``cosine``: Nichol and Dhariwal 2021, betas at most 0.999.
    ``linear_gamma2``: gamma_t^2 = 1 - (t + 1) / T (paper, section 4.1).
    ``linear_sigma``: gamma = 1, sigma_t = max_sigma * t / (T - 1) (paper, section 4.3).
    ``geometric``: gamma = 1, sigma_t = min_sigma (max_sigma / min_sigma)^(t / (T - 1)), the
    variance-exploding process of Song et al. 2021.
    ``single``: gamma = 1 and one sigma; T is 1 whatever ``steps`` says.
    ``rectified_flow``: sigma_t = (t + 1) / T, gamma_t = 1 - sigma_t (Liu et al. 2023).
    """
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    if name == "rectified_flow":
        return 1 - time, time
    if name in ("linear_sigma", "geometric", "single"):
        sigma = torch.linspace(0, max_sigma, steps, dtype=torch.float64)
        if name == "geometric":
            ends = torch.tensor([min_sigma, max_sigma], dtype=torch.float64).log()
            sigma = torch.linspace(*ends.tolist(), steps, dtype=torch.float64).exp()
        if name == "single":
            sigma = torch.tensor([single_sigma], dtype=torch.float64)
        return torch.ones_like(sigma), sigma
    if name == "ddpm":
        gamma2 = (1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)).cumprod(0)
    elif name == "cosine":
        ends = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((ends + 0.008) / 1.008 * math.pi / 2) ** 2
        gamma2 = (bar[1:] / bar[:-1]).clamp(min=0.001).cumprod(0)
    elif name == "linear_gamma2":
        gamma2 = 1 - time
    else:
        raise ValueError(f"unknown noise schedule {name!r}")
    return gamma2.sqrt(), (1 - gamma2).sqrt()


def normal(
    seed: int, positions: torch.Tensor, shape: tuple[int, ...], stream: int = NOISE
) -> torch.Tensor:
    """Standard normal noise, float32 (B, *shape), one draw for each image number.

    The noise of image n depends on the seed, the stream and n alone: not on the batch around it, the
    rank, the device, or whether the run was interrupted. ``positions`` is int64 (B,). From
    ``SAMPLING`` on, each number is the stream of one step of a sampler.
    """
    count = math.prod(shape)
    words = _philox(seed, positions, -(-count // 4), stream)  # (B, blocks, 4)
    uniform = (words.float() + 0.5) * 2**-32
    # Box-Muller: two uniforms give two normals. Half a step off zero keeps the logarithm finite.
    radius = torch.sqrt(-2 * torch.log(uniform[..., :2]))
    angle = 2 * math.pi * uniform[..., 2:]
    normals = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return normals.flatten(1)[:, :count].reshape(-1, *shape)


def timesteps(seed: int, positions: torch.Tensor, steps: int) -> torch.Tensor:
    """t uniform in 0 .. steps - 1 for each image number, int64 (B,)."""
    return _philox(seed, positions, 1, _TIMESTEP)[:, 0, 0] * steps >> 32


def dropped(seed: int, positions: torch.Tensor, probability: float) -> torch.Tensor:
    """Which labels are withheld, bool (B,)."""
    return _philox(seed, positions, 1, _LABEL)[:, 0, 0] < probability * 2**32


def _philox(seed: int, positions: torch.Tensor, blocks: int, stream: int) -> torch.Tensor:
    """Random 32-bit words of the images' streams, int64 (B, blocks, 4)."""
    block = torch.arange(blocks, device=positions.device)
    position = positions[:, None].expand(-1, blocks)
    counter = (block.expand_as(position), position & _WORD, position >> 32, stream)
    key = (seed & _WORD, seed >> 32 & _WORD)
    return torch.stack(philox_rounds(counter, key), dim=-1)


def philox_rounds(counter: tuple, key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox 4x32 on four int64 tensors that hold unsigned 32-bit words."""
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
