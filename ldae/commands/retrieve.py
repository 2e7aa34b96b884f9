"""``ldae retrieve``: images of the query's class should come first among all, by cosine."""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from tyro.conf import Fixed

from ldae.data.source import Source
from ldae.distributed import all_reduce_sum
from ldae.errors import InputError
from ldae.evals.evaluation import BackboneSpec, EvalSourceSpec, Setup, SourceSpec, open_evaluation
from ldae.evals.features import Features, gather_rows, known_labels
from ldae.evals.heads import images_of
from ldae.evals.neighbours import PAIRS_AT_ONCE, Bank, check_enough
from ldae.evals.protocol import Protocol
from ldae.tree import COUNT


@dataclass(frozen=True)
class RetrievalProtocol(Protocol):
    """Each evaluation image puts the train images in order, by cosine."""

    name: Fixed[str] = "retrieval"
    version: Fixed[int] = 1
    k: Annotated[tuple[int, ...], COUNT] = (1, 5, 10)
    """Recall at k is the share of images with an image of their class among the first k."""
    similarity: Fixed[str] = "cosine"
    leave_one_out: bool = False
    """Each evaluation image searches the other evaluation images instead of train."""

    @property
    def headlines(self) -> tuple[str, ...]:
        return ("mean_average_precision", *(f"recall_at_{k}" for k in self.k))


def retrieve(
    backbone: BackboneSpec,
    /,
    data: SourceSpec,
    eval_data: EvalSourceSpec = None,
    *,
    protocol: RetrievalProtocol = RetrievalProtocol(),
    setup: Setup = Setup(),
) -> dict:
    """Grade a backbone by retrieval: images of the same class should come first.

    Returns: what results.json holds; its results are, in percent, the mean over queries of the
    average precision over the whole order, and recall at every k.

    Raises: InputError for a backbone or data that cannot be graded.
    """
    others = protocol.leave_one_out
    eval_data = (eval_data or data) if others else eval_data
    with open_evaluation("retrieve", backbone, data, eval_data, protocol, setup) as evaluation:
        if others:
            evaluation = replace(evaluation, train=evaluation.eval)
        check_enough(max(protocol.k), len(evaluation.train), others)  # before the work
        _check_findable(evaluation.train, evaluation.eval, others)
        train, test = evaluation.features()
        results = retrieval(train, test, protocol, evaluation.device)
        return evaluation.write(results, train.features.shape[1])


def retrieval(
    train: Features,
    test: Features,
    protocol: RetrievalProtocol = RetrievalProtocol(),
    device: torch.device = torch.device("cpu"),
) -> dict[str, float]:
    """Return mean average precision and recall at every k, in percent.

    ``train`` and ``test`` are this rank's share, and the same where each image searches the others. The
    class of every query must be in ``train``.
    """
    images, queries = (images_of(share, device) for share in (train, test))
    labels = gather_rows(train.labels, images, device)
    bank = Bank(train, device)
    all_of_them = images - protocol.leave_one_out
    positions = torch.arange(1, all_of_them + 1, dtype=torch.float64)
    sums = torch.zeros(1 + len(protocol.k), dtype=torch.float64)
    chunk = max(PAIRS_AT_ONCE // images, 1)
    for found in bank.nearest(test, all_of_them, others=protocol.leave_one_out, chunk=chunk):
        right = labels[found.numbers] == test.labels[found.queries, None]  # (B, N)
        precision = right.cumsum(1) / positions
        sums[0] += ((precision * right).sum(1) / right.sum(1)).sum()
        for place, k in enumerate(protocol.k, 1):
            sums[place] += right[:, :k].any(1).sum()
    shares = (100 * all_reduce_sum(sums.to(device)) / queries).tolist()
    return dict(zip(protocol.headlines, shares, strict=True))


def _check_findable(train: Source, test: Source, others: bool) -> None:
    """Raises: InputError, naming the class, when a query has none of its class to find."""
    wanted, there = known_labels(test), known_labels(train)
    counts = torch.bincount(there, minlength=int(wanted.max()) + 1)
    for label in wanted.unique().tolist():
        if counts[label] <= others:
            name = repr(test.classes[label]) if test.classes else label
            raise InputError(
                f"class {name} of {test.spec} has no image to be found in "
                f"{train.spec} ({train.split})"
            )
