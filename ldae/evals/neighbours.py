"""Exact search of the nearest images by cosine, over the shares of all ranks, and the k-NN vote."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tyro.conf import Fixed

from ldae.console import print_main, progress
from ldae.distributed import all_reduce_sum, rank, world_size
from ldae.errors import InputError
from ldae.evals.accuracy import label_ranks
from ldae.evals.features import (
    Features,
    allocate_rows,
    gather_rows,
    move_if_fits,
)
from ldae.evals.heads import count_images
from ldae.evals.predictions import Predictions
from ldae.evals.subsets import FewShotProtocol
from ldae.evals.whitening import WhiteningProtocol, whitening_of
from ldae.tree import COUNT, POSITIVE

QUERIES_AT_ONCE = 1024
_ROWS_AT_ONCE = 65_536  # of the searched images: a block of similarities takes 256 MiB
PAIRS_AT_ONCE = 2**21
"""Queries times images when all images are sorted."""


class Nearest(NamedTuple):
    """The nearest images of some of the queries."""

    queries: torch.Tensor
    """int64 (B,): positions of these queries in this rank's share."""
    similarities: torch.Tensor
    """float32 (B, k), on the CPU, in descending order."""
    indices: torch.Tensor
    """int64 (B, k), on the CPU: the images found; of equal similarities the smaller index first."""


class Bank:
    """The searched images, of which each rank holds its share as unit vectors.

    ``chosen`` (N,) marks which of the images of all ranks are searched, by default all. Images and
    queries go through ``whitening`` before they become unit vectors. On the CPU the vectors lie in
    memory or in a file (``allocate_rows``), and are never copied as a whole.
    """

    def __init__(
        self,
        share: Features,
        device: torch.device,
        chosen: torch.Tensor | None = None,
        whitening: nn.Module = nn.Identity(),
    ) -> None:
        if chosen is None:
            chosen = torch.ones(count_images(share, device), dtype=torch.bool)
        positions = chosen[rank() :: world_size()].nonzero()[:, 0]
        rows = allocate_rows(len(positions), share.features.shape[1])
        for block, into in zip(positions.split(_ROWS_AT_ONCE), rows.split(_ROWS_AT_ONCE)):
            into.copy_(F.normalize(whitening(share.features[block])))
        self.device, self.rows = device, move_if_fits(rows, device)
        self.whitening = whitening
        self.indices = (positions * world_size() + rank()).to(device)
        sizes = torch.bincount(chosen.nonzero()[:, 0] % world_size(), minlength=world_size())
        self.size, self._largest_share = int(sizes.sum()), int(sizes.max())

    def nearest(
        self, share: Features, k: int, *, others: bool = False, chunk: int = QUERIES_AT_ONCE
    ) -> Iterator[Nearest]:
        """Yield the ``k`` nearest images of this rank's queries.

        Every query is searched in the shares of all ranks. The result does not depend on the world
        size, except for the rounding of similarities.

        Args:
            share: this rank's share of the queries.
            others: the queries are the images of the bank's split, and no image finds itself.
            chunk: about how many queries of all ranks are searched at a time.

        Raises: InputError when there are fewer than ``k`` images to find.
        """
        check_enough(k, self.size, others)
        count = count_images(share, self.device)
        step = max(chunk // world_size(), 1)  # queries of this rank
        with progress(count, "search") as bar:
            for first in range(0, -(-count // world_size()), step):
                block = min(step * world_size(), count - first * world_size())
                rows = share.features[first : first + step]
                whitened = self.whitening(gather_rows(rows, block, self.device))
                queries = F.normalize(whitened.to(self.device))
                nearest = self._search_all_ranks(queries, min(k + others, self.size))
                similarities, indices = (part[rank() :: world_size()].cpu() for part in nearest)
                positions = first + torch.arange(len(rows))
                if others:
                    itself = positions * world_size() + rank()
                    order = (indices == itself[:, None]).sort(dim=1, stable=True).indices[:, :k]
                    similarities, indices = similarities.gather(1, order), indices.gather(1, order)
                yield Nearest(positions, similarities, indices)
                bar.update(block)

    def _search_all_ranks(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return similarities and indices of the ``k`` nearest images, on all ranks."""
        similarities, positions = self._search_share(queries, min(k, len(self.rows)))
        indices = self.indices[positions]
        if world_size() > 1:
            shape = (world_size(), len(queries), min(k, self._largest_share))
            all_similarities = queries.new_zeros(shape)
            all_similarities[rank()] = -torch.inf  # padding, where this share has fewer
            all_similarities[rank(), :, : similarities.shape[1]] = similarities
            all_indices = self.indices.new_zeros(shape)
            all_indices[rank(), :, : indices.shape[1]] = indices
            similarities, indices = (
                all_reduce_sum(part).transpose(0, 1).flatten(1)
                for part in (all_similarities, all_indices)
            )
        order = indices.argsort(1)
        similarities, indices = similarities.gather(1, order), indices.gather(1, order)
        similarities, order = similarities.sort(dim=1, descending=True, stable=True)
        return similarities[:, :k], indices.gather(1, order)[:, :k]

    def _search_share(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return similarities and positions of the ``k`` nearest images in this rank's share."""
        if 4 * k >= len(self.rows):
            return self._sort_share(queries, k)
        # On macOS, faiss and torch bring an OpenMP each, and a process that uses both crashes.
        by_faiss = self.device.type == "cpu" and sys.platform != "darwin"
        search = self._search_by_faiss if by_faiss else self._search_by_torch
        similarities, positions = search(queries, k + 1)
        # A search may leave out any of equally similar images; the last one has to be left out.
        tied = similarities[:, k - 1] == similarities[:, k]
        similarities, positions = similarities[:, :k], positions[:, :k]
        if tied.any():
            similarities[tied], positions[tied] = self._sort_share(queries[tied], k)
        return similarities, positions

    def _sort_share(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what ``_search_share`` does by sorting all images."""
        similarities = queries.new_empty(len(queries), k)
        positions = similarities.to(torch.int64)
        at_once = max(PAIRS_AT_ONCE // max(len(self.rows), 1), 1)
        for first in range(0, len(queries), at_once):
            block = slice(first, first + at_once)
            products = torch.cat([queries[block] @ rows.T for rows in self._blocks()], 1)
            order = products.sort(dim=1, descending=True, stable=True)
            similarities[block], positions[block] = order.values[:, :k], order.indices[:, :k]
        return similarities, positions

    def _search_by_faiss(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        import faiss

        nearest = faiss.knn(
            queries.numpy(), self.rows.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT
        )
        return torch.from_numpy(nearest[0]), torch.from_numpy(nearest[1])

    def _search_by_torch(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        best = queries.new_empty(len(queries), 0)
        positions = best.to(torch.int64)
        for number, rows in enumerate(self._blocks()):
            similarities, order = (queries @ rows.T).topk(min(k, len(rows)))
            best = torch.cat([best, similarities], 1)
            positions = torch.cat([positions, order + number * _ROWS_AT_ONCE], 1)
            best, order = best.topk(min(k, best.shape[1]))
            positions = positions.gather(1, order)
        return best, positions

    def _blocks(self) -> Iterator[torch.Tensor]:
        return (rows.to(self.device) for rows in self.rows.split(_ROWS_AT_ONCE))


def check_enough(k: int, images: int, others: bool = False) -> None:
    """Check that ``images`` are enough for ``k`` neighbours.

    Args:
        others: the query is one of the images, and does not count.

    Raises: InputError when they are too few.
    """
    if k > images - others:
        query = ", one of which is the query" if others else ""
        raise InputError(f"k = {k} is more neighbours than images: there are {images:,}{query}")


@dataclass(frozen=True)
class KNNProtocol(WhiteningProtocol, FewShotProtocol):
    """DINO's weighted vote of the nearest neighbours by cosine.

    Source: DINO, eval_knn.py; draws: DINOv2, eval/knn.py.
    """

    shares_features = True
    name: Fixed[str] = "dino"
    version: Fixed[int] = 1
    k: Annotated[tuple[int, ...], COUNT] = (10, 20, 100, 200)
    """Numbers of neighbours, each graded; of the default ones those that the images allow. DINOv2
    takes no k above the shots: for its 5-shot number, --k 5 --shots 5."""
    temperature: Annotated[float, POSITIVE] = 0.07
    """A neighbour of cosine similarity s has the weight exp(s / temperature)."""
    leave_one_out: bool = False
    """Classify each train image by the other train images."""

    @property
    def accuracies(self) -> tuple[str, ...]:
        return tuple(f"top{n}_k{k}" for k in self.k for n in (1, 5))

    @property
    def headline(self) -> str:
        """That of k = 20, as is usual, if it is one of the k; otherwise of the first k."""
        first = super().headline
        return first.replace(f"_k{self.k[0]}", "_k20") if 20 in self.k else first


def limit_k(protocol: KNNProtocol, images: int, of: str = "") -> KNNProtocol:
    """Return ``protocol`` without the default k that so few images do not allow; print a note.

    ``of`` says in the note what these k are left out of.

    Raises: InputError when a k that was asked for, or every default k, is too large.
    """
    others = protocol.leave_one_out
    asked = protocol.k != KNNProtocol.k
    check_enough(max(protocol.k) if asked else min(protocol.k), images, others)
    left_out = [k for k in protocol.k if k > images - others]
    if left_out:
        print_main(f"k = {', '.join(map(str, left_out))} left out{of}: there are {images:,} images")
    return replace(protocol, k=tuple(k for k in protocol.k if k not in left_out))


def knn_accuracy(
    train: Features,
    test: Features,
    protocol: KNNProtocol = KNNProtocol(),
    device: torch.device = torch.device("cpu"),
    chosen: torch.Tensor | None = None,
    whitening: nn.Module | None = None,
    predictions: Predictions | None = None,
) -> dict[str, float]:
    """Return top-1 and top-5 in percent for every k, as ``top1_k20``, from one search.

    Top-5 counts fewer than five classes when there are fewer classes or neighbours.

    Args:
        train: this rank's share of the searched images.
        test: this rank's share of the queries.
        chosen: bool (N,), which of the train images of all ranks are searched; by default all.
        whitening: by default what the protocol asks for, of all train images.
        predictions: gets the predicted classes for every k, as ``k20``.

    Raises: InputError when there are more neighbours than images, or too few images to whiten.
    """
    images, queries = (count_images(share, device) for share in (train, test))
    labels = gather_rows(train.labels, images, device)
    classes = int(labels.max()) + 1
    hits = torch.zeros(len(protocol.k), 2, dtype=torch.int64)
    bank = Bank(train, device, chosen, whitening or whitening_of(train, protocol, device))
    for nearest in bank.nearest(test, max(protocol.k), others=protocol.leave_one_out):
        targets, neighbour_labels = test.labels[nearest.queries], labels[nearest.indices]
        for row, k in enumerate(protocol.k):
            neighbours = nearest.similarities[:, :k], neighbour_labels[:, :k]
            scores = vote(*neighbours, classes, protocol.temperature)
            placed = label_ranks(scores, targets)
            hits[row] += torch.stack([(placed < n).sum() for n in (1, min(5, k))])
            if predictions:
                predictions.add(f"k{k}", nearest.queries, scores)
    percent = 100 * all_reduce_sum(hits.to(device)).cpu().double() / queries
    return dict(zip(protocol.accuracies, percent.flatten().tolist(), strict=True))


def vote(
    similarities: torch.Tensor,
    labels_of_neighbours: torch.Tensor,
    num_classes: int,
    temperature: float,
) -> torch.Tensor:
    """Sum the weights of each class's neighbours: (B, k), (B, k) -> (B, num_classes).

    A neighbour's weight is exp(similarity / temperature). It is divided by the weight of the most
    similar neighbour, so that no temperature overflows; the order of the classes stays the same.
    """
    relative = similarities.double() - similarities[:, :1].double()
    scores = torch.zeros(len(similarities), num_classes, dtype=torch.float64)
    return scores.scatter_add_(1, labels_of_neighbours, (relative / temperature).exp())
