"""``ldae retrieve``: grade a backbone by retrieval of images of the query's class."""

from dataclasses import dataclass
from typing import Annotated

import torch
from tyro.conf import Fixed

from ldae.data.source import Source
from ldae.distributed import all_reduce_sum
from ldae.errors import InputError
from ldae.evals.evaluation import EvalSourceSpec, FeaturesSourceSpec, FeaturesSpec, Setup
from ldae.evals.features import Features, gather_rows, known_labels
from ldae.evals.heads import count_images
from ldae.evals.neighbours import PAIRS_AT_ONCE, Bank, check_enough
from ldae.evals.open import data_of, labelled_splits, open_evaluation
from ldae.evals.seeds import over_seeds
from ldae.evals.whitening import WhiteningProtocol, whitening_of
from ldae.tree import COUNT


@dataclass(frozen=True)
class RetrievalProtocol(WhiteningProtocol):
    """Each evaluation image ranks the train images by cosine."""

    shares_features = True
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


@over_seeds
def retrieve(
    backbone: FeaturesSpec,
    /,
    data: FeaturesSourceSpec = None,
    eval_data: EvalSourceSpec = None,
    *,
    protocol: RetrievalProtocol = RetrievalProtocol(),
    setup: Setup = Setup(),
) -> dict:
    """Grade a backbone by retrieval: images of the query's class should rank first, by cosine.

    Returns: the content of results.json; its results are, in percent, the mean average precision
    over the full ranking, and recall at every k.

    Raises: InputError for a backbone or data that cannot be graded.

    Examples:
        >>> ldae.retrieve("runs/l_dae", "/data/imagenet")["results"]["mean_average_precision"]
    """
    data, others = data_of(backbone, data), protocol.leave_one_out
    eval_data = (eval_data or data) if others else eval_data
    splits = _queries_alone if others else labelled_splits
    with open_evaluation(
        "retrieve", backbone, data, eval_data, protocol, setup, splits
    ) as evaluation:
        check_enough(max(protocol.k), len(evaluation.train), others)
        _check_findable(evaluation.train, evaluation.eval, others)
        train, test = evaluation.features()
        results = retrieval(train, test, protocol, evaluation.device)
        return evaluation.write(results, train.features.shape[1])


def _queries_alone(data: str, eval_data: str | None) -> tuple[Source, Source]:
    """Return the evaluation split as the images to search and as those to grade."""
    _, test = labelled_splits(data, eval_data)
    return test, test


def retrieval(
    train: Features,
    test: Features,
    protocol: RetrievalProtocol = RetrievalProtocol(),
    device: torch.device = torch.device("cpu"),
) -> dict[str, float]:
    """Return mean average precision and recall at every k, in percent.

    ``train`` and ``test`` are this rank's share; with leave-one-out they are the same. The class of
    every query must be in ``train``.
    """
    images, queries = (count_images(share, device) for share in (train, test))
    labels = gather_rows(train.labels, images, device)
    bank = Bank(train, device, whitening=whitening_of(train, protocol, device))
    others = protocol.leave_one_out
    positions = torch.arange(1, images - others + 1, dtype=torch.float64)
    sums = torch.zeros(1 + len(protocol.k), dtype=torch.float64)
    chunk = max(PAIRS_AT_ONCE // images, 1)
    for nearest in bank.nearest(test, images - others, others=others, chunk=chunk):
        right = labels[nearest.indices] == test.labels[nearest.queries, None]  # (B, N)
        precision = right.cumsum(1) / positions
        sums[0] += ((precision * right).sum(1) / right.sum(1)).sum()
        for i, k in enumerate(protocol.k, 1):
            sums[i] += right[:, :k].any(1).sum()
    percent = (100 * all_reduce_sum(sums.to(device)) / queries).tolist()
    return dict(zip(protocol.headlines, percent, strict=True))


def _check_findable(train: Source, test: Source, others: bool) -> None:
    """Check that each query has an image of its class to find.

    Raises: InputError naming the class that has none.
    """
    queries = known_labels(test)
    counts = torch.bincount(known_labels(train), minlength=int(queries.max()) + 1)
    for label in queries.unique().tolist():
        if counts[label] <= others:
            name = repr(test.classes[label]) if test.classes else label
            raise InputError(
                f"class {name} of {test.spec} has no image to find in {train.spec} ({train.split})"
            )
