"""Top-n accuracy by the rank of the true class."""

from collections.abc import Iterable

import torch

from ldae.distributed import all_reduce_sum

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


def best_ranks(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``ranks`` of whichever right class comes first; labels (B, m) are filled up by -1."""
    found = [
        torch.where(column < 0, NOWHERE, ranks(scores, column.clamp(min=0))) for column in labels.T
    ]
    return torch.stack(found).amin(0)


def top1_top5(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    labels: torch.Tensor,
    images: int,
    device: torch.device,
) -> dict[str, float]:
    """Top-1 and top-5 in percent of ``images`` over all ranks.

    ``batches`` are this rank's logits (B, C) and the indices (B,) of their images; ``labels`` (N, m)
    are the right classes of every image, as ``best_ranks`` takes them; ``device`` is where the ranks
    exchange.
    """
    right = torch.zeros(2, dtype=torch.int64)
    for logits, indices in batches:
        placed = best_ranks(logits, labels[indices])
        right += torch.stack([(placed < n).sum() for n in (1, 5)])
    top1, top5 = (100 * all_reduce_sum(right.to(device)).cpu() / images).tolist()
    return {"top1": top1, "top5": top5}
