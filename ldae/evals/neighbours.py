"""The nearest images by cosine, searched exactly, in blocks, over the shares of all ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from tyro.conf import Fixed

from ldae.console import progress
from ldae.distributed import all_reduce_sum, rank, world_size
from ldae.errors import InputError
from ldae.evals.accuracy import ranks
from ldae.evals.features import (
    Features,
    gather_rows,
    new_rows,
    rows_on,
)
from ldae.evals.heads import images_of
from ldae.evals.subsets import DrawsProtocol
from ldae.tree import COUNT, POSITIVE

QUERIES_AT_ONCE = 1024
_ROWS_AT_ONCE = 65_536  # that are searched: a block of similarities takes 256 MiB
PAIRS_AT_ONCE = 2**21
"""Queries times images where all images are put in order."""


class Nearest(NamedTuple):
    """What is nearest to some of the queries."""

    queries: torch.Tensor
    """int64 (B,): the places of these queries in this rank's share."""
    similarities: torch.Tensor
    """float32 (B, k), on the CPU, the largest first."""
    numbers: torch.Tensor
    """int64 (B, k), on the CPU: of the images found, of equally similar ones the smaller first."""


class Bank:
    """The images that are searched, of which each rank holds its share as unit vectors.

    ``chosen`` (N,) tells which of all images are searched, by default all. On the CPU the vectors
    lie in memory or in a file (``new_rows``), and are never copied whole.
    """

    def __init__(
        self, share: Features, device: torch.device, chosen: torch.Tensor | None = None
    ) -> None:
        images = images_of(share, device)
        chosen = torch.ones(images, dtype=torch.bool) if chosen is None else chosen
        places = chosen[rank() :: world_size()].nonzero()[:, 0]
        rows = new_rows(len(places), share.features.shape[1])
        for block, into in zip(places.split(_ROWS_AT_ONCE), rows.split(_ROWS_AT_ONCE)):
            into.copy_(F.normalize(share.features[block]))
        self.device, self.rows = device, rows_on(rows, device)
        self.numbers = (places * world_size() + rank()).to(device)
        held = torch.bincount(chosen.nonzero()[:, 0] % world_size(), minlength=world_size())
        self.size, self._largest_share = int(held.sum()), int(held.max())

    def nearest(
        self, share: Features, k: int, *, others: bool = False, chunk: int = QUERIES_AT_ONCE
    ) -> Iterator[Nearest]:
        """The ``k`` nearest to each of this rank's queries, about ``chunk`` queries of all at a time.

        Every query is searched in every rank's share, and the result is the same at any world
        size, but for the rounding of similarities. ``others``: the queries are the images of the
        bank's split, and none is found by itself.

        Raises: InputError when there are fewer than ``k`` to find.
        """
        check_enough(k, self.size, others)
        count = images_of(share, self.device)
        step = max(chunk // world_size(), 1)  # of this rank's
        with progress(count, "search") as bar:
            for first in range(0, -(-count // world_size()), step):
                block = min(step * world_size(), count - first * world_size())
                own = share.features[first : first + step]
                queries = F.normalize(gather_rows(own, block, self.device).to(self.device))
                similarities, numbers = self._merged(queries, min(k + others, self.size))
                similarities, numbers = (
                    found[rank() :: world_size()].cpu() for found in (similarities, numbers)
                )
                places = first + torch.arange(len(own))
                if others:
                    itself = places * world_size() + rank()
                    order = (numbers == itself[:, None]).sort(dim=1, stable=True).indices
                    similarities, numbers = (
                        found.gather(1, order[:, :k]) for found in (similarities, numbers)
                    )
                yield Nearest(places, similarities, numbers)
                bar.update(block)

    def _merged(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``k`` nearest in the shares of all ranks, on all ranks."""
        similarities, places = self._own(queries, min(k, len(self.rows)))
        numbers = self.numbers[places]
        if world_size() > 1:
            shape = (world_size(), len(queries), min(k, self._largest_share))
            every = queries.new_zeros(shape)
            every[rank()] = -torch.inf  # where this share has fewer
            every_number = self.numbers.new_zeros(shape)
            every[rank(), :, : similarities.shape[1]] = similarities
            every_number[rank(), :, : numbers.shape[1]] = numbers
            similarities, numbers = (
                all_reduce_sum(part).transpose(0, 1).flatten(1) for part in (every, every_number)
            )
        order = numbers.argsort(1)
        similarities, numbers = similarities.gather(1, order), numbers.gather(1, order)
        similarities, order = similarities.sort(dim=1, descending=True, stable=True)
        return similarities[:, :k], numbers.gather(1, order)[:, :k]

    def _own(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``k`` nearest in this rank's share: similarities and places in it."""
        if 4 * k >= len(self.rows):
            return self._in_order(queries, k)
        similarities, places = self._search(queries, k + 1)
        # Which of equally similar ones a search leaves out is its own choice: ours is the last.
        tied = similarities[:, k - 1] == similarities[:, k]
        similarities, places = similarities[:, :k], places[:, :k]
        if tied.any():
            similarities[tied], places[tied] = self._in_order(queries[tied], k)
        return similarities, places

    def _in_order(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``_own`` by sorting all."""
        similarities = queries.new_empty(len(queries), k)
        places = similarities.to(torch.int64)
        at_once = max(PAIRS_AT_ONCE // max(len(self.rows), 1), 1)
        for first in range(0, len(queries), at_once):
            block = slice(first, first + at_once)
            found = [queries[block] @ rows.T for rows in self._blocks()]
            found = torch.cat(found, 1).sort(dim=1, descending=True, stable=True)
            similarities[block], places[block] = found.values[:, :k], found.indices[:, :k]
        return similarities, places

    def _search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return similarities and places, found by faiss on a CPU and by torch elsewhere."""
        if self.device.type == "cpu":
            return self._search_by_faiss(queries, k)
        return self._search_by_torch(queries, k)

    def _search_by_faiss(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        import faiss

        found = faiss.knn(queries.numpy(), self.rows.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    def _search_by_torch(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        best = queries.new_empty(len(queries), 0)
        places = best.to(torch.int64)
        for number, rows in enumerate(self._blocks()):
            similar, found = (queries @ rows.T).topk(min(k, len(rows)))
            best = torch.cat([best, similar], 1)
            places = torch.cat([places, found + number * _ROWS_AT_ONCE], 1)
            best, order = best.topk(min(k, best.shape[1]))
            places = places.gather(1, order)
        return best, places

    def _blocks(self) -> Iterator[torch.Tensor]:
        return (rows.to(self.device) for rows in self.rows.split(_ROWS_AT_ONCE))


def check_enough(k: int, images: int, others: bool = False) -> None:
    """Raises: InputError for more neighbours than images, or than other images."""
    if k > images - others:
        left = f"{images:,} images, of which one asks" if others else f"{images:,} images"
        raise InputError(f"k = {k} is more neighbours than images: there are {left}")


@dataclass(frozen=True)
class KNNProtocol(DrawsProtocol):
    """DINO's weighted vote of the nearest neighbours by cosine.

    Source: DINO, eval_knn.py; draws: DINOv2, eval/knn.py.
    """

    name: Fixed[str] = "dino"
    version: Fixed[int] = 1
    k: Annotated[tuple[int, ...], COUNT] = (10, 20, 100, 200)
    """Numbers of neighbours, each graded."""
    temperature: Annotated[float, POSITIVE] = 0.07
    """A neighbour of cosine similarity s has the weight exp(s / temperature)."""
    leave_one_out: bool = False
    """Classify each train image by the others instead."""

    @property
    def accuracies(self) -> tuple[str, ...]:
        return tuple(f"top{n}_k{k}" for k in self.k for n in (1, 5))


def knn_accuracy(
    train: Features,
    test: Features,
    protocol: KNNProtocol = KNNProtocol(),
    device: torch.device = torch.device("cpu"),
    chosen: torch.Tensor | None = None,
) -> dict[str, float]:
    """Return top-1 and top-5 in percent for every k, as ``top1_k20``, from one search.

    ``train`` and ``test`` are this rank's share; of all train images those ``chosen`` (N,) are searched.
    Top-5 looks at as many classes as there are, and as there are neighbours, where that is fewer.

    Raises: InputError when there are more neighbours than images.
    """
    images, queries = (images_of(share, device) for share in (train, test))
    labels = gather_rows(train.labels, images, device)
    classes = int(labels.max()) + 1
    hits = torch.zeros(len(protocol.k), 2, dtype=torch.int64)
    bank = Bank(train, device, chosen)
    for found in bank.nearest(test, max(protocol.k), others=protocol.leave_one_out):
        wanted, labels_of_found = test.labels[found.queries], labels[found.numbers]
        for row, k in enumerate(protocol.k):
            near = found.similarities[:, :k], labels_of_found[:, :k]
            placed = ranks(vote(*near, classes, protocol.temperature), wanted)
            hits[row] += torch.stack([(placed < n).sum() for n in (1, min(5, k))])
    shares = 100 * all_reduce_sum(hits.to(device)).cpu().double() / queries
    return dict(zip(protocol.accuracies, shares.flatten().tolist(), strict=True))


def vote(
    similarities: torch.Tensor,
    labels_of_neighbours: torch.Tensor,
    num_classes: int,
    temperature: float,
) -> torch.Tensor:
    """The summed weight of every class among the neighbours: (B, k), (B, k) -> (B, num_classes).

    A neighbour weighs exp(similarity / temperature), divided here by the weight of the first one,
    the most similar, so that no temperature overflows and each row keeps its order.
    """
    relative = similarities.double() - similarities[:, :1].double()
    scores = torch.zeros(len(similarities), num_classes, dtype=torch.float64)
    return scores.scatter_add_(1, labels_of_neighbours, (relative / temperature).exp())
