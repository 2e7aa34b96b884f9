"""Top-n accuracy by the rank of the true class."""

import torch


def ranks(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many classes are placed before the true one: (B, C) scores and (B,) labels -> (B,).

    Of equal scores the smaller class comes first, so the result is the same on every device. A
    class that has no score is placed last, and so is every class where the scores are not numbers:
    a diverged classifier is never right.
    """
    classes = scores.shape[1]
    true = scores.gather(1, labels.clamp(max=classes - 1)[:, None])
    earlier = torch.arange(classes, device=scores.device) < labels[:, None]
    before = ~(scores <= true) | (scores == true) & earlier
    return torch.where(labels < classes, before.sum(1), classes)


def top(ranks: torch.Tensor, n: int) -> float:
    """The share of ranks below ``n``, in percent."""
    return 100 * (ranks < n).double().mean().item()
