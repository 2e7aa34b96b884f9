"""Random draws that depend on the seed and on an image's position in the run alone."""

import math

import torch

# Philox 4x32, 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

# Streams: the fourth word of the counter separates the draws for one image. From SAMPLING on, each
# step of a sampler has a stream.
NOISE, _TIMESTEP, _LABEL, POSTERIOR, SAMPLING = range(5)
MASK = _WORD


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
