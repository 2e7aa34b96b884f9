"""Top-n accuracy by the rank of the true class."""

import torch

NOWHERE = 2**31 - 1


def ranks(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many classes are placed before the true one: (B, C) scores and (B,) labels -> (B,).

    Of equal scores the smaller class comes first, so the result is the same on every device.
    ``NOWHERE``, where no top-n reaches, when the true class has no score or one that is not a
    number: an unseen class is never found, a diverged classifier never right.
    """
    classes = scores.shape[1]
    true = scores.gather(1, labels.clamp(max=classes - 1)[:, None])
    earlier = torch.arange(classes, device=scores.device) < labels[:, None]
    before = (scores > true) | (scores == true) & earlier
    scored = (labels < classes) & ~true[:, 0].isnan()
    return torch.where(scored, before.sum(1), NOWHERE)


def top(ranks: torch.Tensor, n: int) -> float:
    """The share of ranks below ``n``, in percent."""
    return 100 * int((ranks < n).sum()) / len(ranks)
