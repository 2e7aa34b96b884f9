"""Retrieval: images of the query's class should come first among all, by cosine."""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
import tyro

from ldae.data.source import Source
from ldae.distributed import all_reduce_sum
from ldae.errors import InputError
from ldae.evals.evaluation import BackboneSpec, Setup, SourceSpec, open_evaluation
from ldae.evals.features import Encoder, Features, gather_rows, known_labels, own_rows
from ldae.evals.heads import images_of
from ldae.evals.neighbours import PAIRS_AT_ONCE, Bank, check_enough
from ldae.tree import COUNT, check


@dataclass(frozen=True)
class RetrievalProtocol:
    """Every constant of the numbers."""

    name: str = "retrieval"
    version: int = 1
    k: Annotated[tuple[int, ...], COUNT] = (1, 5, 10)
    similarity: str = "cosine"
    leave_one_out: bool = False
    """Each evaluation image searches the others, and not train."""

    def __post_init__(self) -> None:
        check(self)
        if not self.k:
            raise InputError("k must name at least one")


def retrieve(
    backbone: BackboneSpec,
    /,
    data: SourceSpec,
    eval_data: SourceSpec | None = None,
    *,
    k: tuple[int, ...] = RetrievalProtocol.k,
    leave_one_out: bool = False,
    setup: Annotated[Setup, tyro.conf.arg(name="")] = Setup(),
) -> dict:
    """Grade a backbone by retrieval: each evaluation image puts the train images in order.

    Args:
        backbone: a run folder, an exported folder, a timm name, NAME@FILE or pixels[:SIZE].
        data: the labelled images whose train split is searched.
        eval_data: the queries, instead of the evaluation split of data.
        k: recall at k is the share of queries with an image of their class among the first k.
        leave_one_out: each evaluation image searches the other ones instead of the train split.
        setup: how the backbone is opened and run.

    Returns: what results.json holds; its results are, in percent, the mean over queries of the
    average precision over the whole order, and recall at every k.

    Raises: InputError for a backbone or data that can not be graded.
    """
    protocol = RetrievalProtocol(k=tuple(k), leave_one_out=leave_one_out)
    queries_from = (eval_data or data) if leave_one_out else eval_data
    with open_evaluation("retrieve", backbone, data, queries_from, setup) as graded:
        if leave_one_out:
            graded = replace(graded, train=graded.eval)
        check_enough(max(protocol.k), len(graded.train), leave_one_out)  # before the work
        _check_findable(graded.train, graded.eval, leave_one_out)
        encoder = Encoder(graded.model, graded.device, setup.precision)
        evaluation = own_rows(encoder, graded.eval, setup.batch_size, setup.workers)
        train = evaluation
        if not leave_one_out:
            train = own_rows(encoder, graded.train, setup.batch_size, setup.workers)
        results = retrieval(train, evaluation, protocol, graded.device)
        return graded.write(protocol, results, train.features.shape[1])


def retrieval(
    train: Features,
    evaluation: Features,
    protocol: RetrievalProtocol = RetrievalProtocol(),
    device: torch.device = torch.device("cpu"),
) -> dict[str, float]:
    """Mean average precision and recall at every k, in percent; every query has some to find.

    Both are this rank's share, and the same where each searches the others.
    """
    images, queries = (images_of(share, device) for share in (train, evaluation))
    labels = gather_rows(train.labels, images, device)
    bank = Bank(train, device)
    all_of_them = images - protocol.leave_one_out
    positions = torch.arange(1, all_of_them + 1, dtype=torch.float64)
    sums = torch.zeros(1 + len(protocol.k), dtype=torch.float64)
    chunk = max(PAIRS_AT_ONCE // images, 1)
    for found in bank.nearest(evaluation, all_of_them, others=protocol.leave_one_out, chunk=chunk):
        right = labels[found.numbers] == evaluation.labels[found.queries, None]  # (B, N)
        precision = right.cumsum(1) / positions
        sums[0] += ((precision * right).sum(1) / right.sum(1)).sum()
        for place, k in enumerate(protocol.k, 1):
            sums[place] += right[:, :k].any(1).sum()
    shares = (100 * all_reduce_sum(sums.to(device)) / queries).tolist()
    names = ["mean_average_precision", *(f"recall_at_{k}" for k in protocol.k)]
    return dict(zip(names, shares))


def _check_findable(train: Source, evaluation: Source, others: bool) -> None:
    """Raises: InputError, naming the class, when a query has none of its class to find."""
    wanted, there = known_labels(evaluation), known_labels(train)
    counts = torch.bincount(there, minlength=int(wanted.max()) + 1)
    for label in wanted.unique().tolist():
        if counts[label] <= others:
            name = repr(evaluation.classes[label]) if evaluation.classes else label
            raise InputError(
                f"class {name} of {evaluation.spec} has no image to be found in "
                f"{train.spec} ({train.split})"
            )
