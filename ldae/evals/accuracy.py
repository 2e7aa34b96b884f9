"""Top-n accuracy by the rank of the true class."""

from collections.abc import Iterable

import torch

from ldae.distributed import all_reduce_sum

UNRANKED = 2**31 - 1


def label_ranks(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count the classes that rank before the true class: scores (B, C), labels (B,) -> (B,).

    Of equal scores the smaller class comes first, so the result is the same on every device. The
    rank is ``UNRANKED``, which is no top-n, when the true class has no score or its score is NaN:
    an unseen class is never found, and a diverged classifier is never right.
    """
    classes = scores.shape[1]
    true = scores.gather(1, labels.clamp(max=classes - 1)[:, None])
    smaller = torch.arange(classes, device=scores.device) < labels[:, None]
    before = (scores > true) | (scores == true) & smaller
    scored = (labels < classes) & ~true[:, 0].isnan()
    return torch.where(scored, before.sum(1), UNRANKED)


def best_label_ranks(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the rank (B,) of the first of several right classes; labels (B, m), padded with -1."""
    columns = [
        torch.where(column < 0, UNRANKED, label_ranks(scores, column.clamp(min=0)))
        for column in labels.T
    ]
    return torch.stack(columns).amin(0)


def top1_top5(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    labels: torch.Tensor,
    images: int,
    device: torch.device,
) -> dict[str, float]:
    """Return top-1 and top-5 over all ranks, in percent of ``images``.

    Args:
        batches: this rank's logits (B, C) and the indices (B,) of their images.
        labels: right classes of every image, (N, m), padded with -1.
        device: where the ranks exchange their counts.
    """
    hits = torch.zeros(2, dtype=torch.int64)
    for logits, indices in batches:
        placed = best_label_ranks(logits, labels[indices])
        hits += torch.stack([(placed < n).sum() for n in (1, 5)])
    top1, top5 = (100 * all_reduce_sum(hits.to(device)).cpu() / images).tolist()
    return {"top1": top1, "top5": top5}
