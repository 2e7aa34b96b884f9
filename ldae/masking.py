"""Masking: which tokens of an image are kept, and how all tokens come back from the kept ones."""

import torch

from ldae import draws
from ldae.errors import InputError


def number_kept(ratio: float, tokens: int, setting: str) -> int:
    """Return how many of ``tokens`` are kept when the share ``ratio`` of them is dropped.

    Raises: InputError naming the setting when none is kept.
    """
    kept = tokens - round(ratio * tokens)
    if kept < 1:
        raise InputError(f"{setting} {ratio:g} keeps none of the {tokens} tokens of an image")
    return kept


def kept_tokens(seed: int, positions: torch.Tensor, tokens: int, count: int) -> torch.Tensor:
    """Return the indices of the kept tokens, int64 (B, count), in rising order.

    Every subset of ``count`` of the ``tokens`` is equally likely. A draw depends on the seed and
    the image's position in the run (B,) alone, as in ``draws.normal``.
    """
    order = draws.random_words(seed, positions, tokens, draws.MASK).argsort(dim=1, stable=True)
    return order[:, :count].sort(dim=1).values


def restore(kept_features: torch.Tensor, kept: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return all tokens (B, N, W): features (B, n, W) at the indices ``kept`` (B, n).

    The other tokens are those of ``others`` (N, W).
    """
    index = kept.unsqueeze(-1).expand_as(kept_features)
    return others.expand(len(kept), -1, -1).scatter(1, index, kept_features)


def is_kept(kept: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return whether each token is among the indices ``kept`` (B, n), bool (B, tokens)."""
    none = torch.zeros(len(kept), tokens, dtype=torch.bool, device=kept.device)
    return none.scatter(1, kept, True)
