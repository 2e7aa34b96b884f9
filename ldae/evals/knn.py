"""The weighted k-nearest-neighbour classifier of DINO, searched exactly."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Callable

import torch
import torch.nn.functional as F
import tyro

from ldae.errors import InputError
from ldae.evals.accuracy import ranks, top
from ldae.evals.features import Features
from ldae.evals.grading import BackboneSpec, Setup, SourceSpec, grading

_QUERIES_AT_ONCE = 1024
_ROWS_AT_ONCE = 65_536  # of the train split: a block of similarities takes 256 MiB

Search = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class KNNProtocol:
    """Every constant of the number. Source: DINO, eval_knn.py."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise InputError(f"k must be numbers of neighbours of at least 1, not {self.k}")
        if not self.temperature > 0:
            raise InputError(f"temperature must be above 0, not {self.temperature}")


def knn(
    backbone: BackboneSpec,
    /,
    data: SourceSpec,
    eval_data: SourceSpec | None = None,
    *,
    k: tuple[int, ...] = KNNProtocol.k,
    temperature: float = KNNProtocol.temperature,
    setup: Annotated[Setup, tyro.conf.arg(name="")] = Setup(),
) -> dict:
    """Grade a backbone by its nearest neighbours, without any training.

    Args:
        backbone: a run folder, an exported folder, a timm name, NAME@FILE or pixels[:SIZE].
        data: the labelled images whose train split is searched.
        eval_data: the images to classify instead of the evaluation split of data.
        k: numbers of neighbours, each graded.
        temperature: a neighbour of cosine similarity s has the weight exp(s / temperature).
        setup: how the backbone is opened and run.

    Returns: what results.json holds; its results are top-1 and top-5 in percent for every k.

    Raises: InputError for a backbone or data that can not be graded.
    """
    protocol = KNNProtocol(tuple(k), temperature)
    with grading("knn", backbone, data, eval_data, setup) as graded:
        check_enough(max(protocol.k), len(graded.train))  # before the work, not after
        train, evaluation = graded.features()
        results = knn_accuracy(train, evaluation, protocol, graded.device)
        return graded.write(protocol, results, train.features.shape[1])


def knn_accuracy(
    train: Features,
    evaluation: Features,
    protocol: KNNProtocol = KNNProtocol(),
    device: torch.device = torch.device("cpu"),
) -> dict[str, float]:
    """Top-1 and top-5 in percent for every k, as ``top1_k20``, from one search.

    Top-5 looks at as many classes as there are, and as there are neighbours, where that is fewer.

    Raises: InputError when there are more neighbours than images.
    """
    classes = int(train.labels.max()) + 1
    similarities, indices = neighbours(
        F.normalize(train.features.to(device)),
        F.normalize(evaluation.features.to(device)),
        max(protocol.k),
    )
    labels_of_neighbours = train.labels[indices]
    results = {}
    for k in protocol.k:
        placed = torch.cat([
            ranks(vote(s, near, classes, protocol.temperature), labels)
            for s, near, labels in zip(
                similarities[:, :k].split(_QUERIES_AT_ONCE),
                labels_of_neighbours[:, :k].split(_QUERIES_AT_ONCE),
                evaluation.labels.split(_QUERIES_AT_ONCE),
            )
        ])  # fmt: skip
        results[f"top1_k{k}"] = top(placed, 1)
        results[f"top5_k{k}"] = top(placed, min(5, k))
    return results


def neighbours(
    train: torch.Tensor, queries: torch.Tensor, k: int, chunk: int = _QUERIES_AT_ONCE
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` rows of ``train`` (N, D) of largest inner product with each of ``queries`` (M, D).

    Returns similarities and indices, both (M, k) and on the CPU, the most similar first. The
    search is exact: by faiss on the CPU where it is installed, else by torch. Beside the inputs
    and the result it holds ``chunk`` queries by 65,536 rows at a time.

    Raises: InputError when ``k`` is larger than N.
    """
    check_enough(k, len(train))
    search = _searcher(train)
    similarities, indices = zip(*(search(block, k) for block in queries.split(chunk)))
    return torch.cat(similarities), torch.cat(indices)


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


def check_enough(k: int, images: int) -> None:
    """Raises: InputError for more neighbours than images."""
    if k > images:
        raise InputError(f"k = {k} is more neighbours than images: the train split has {images}")


def _searcher(train: torch.Tensor) -> Search:
    try:
        import faiss
    except ImportError:
        return partial(_torch_search, train)
    if train.is_cuda:  # faiss-cpu would bring it back to the processor
        return partial(_torch_search, train)
    index = faiss.IndexFlatIP(train.shape[1])
    index.add(train.numpy())

    def search(queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        similarities, indices = index.search(queries.numpy(), k)
        return torch.from_numpy(similarities), torch.from_numpy(indices)

    return search


def _torch_search(
    train: torch.Tensor, queries: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    best = torch.empty(len(queries), 0, device=queries.device)
    indices = torch.empty_like(best, dtype=torch.int64)
    for number, rows in enumerate(train.split(_ROWS_AT_ONCE)):
        similar, places = (queries @ rows.T).topk(min(k, len(rows)))
        best = torch.cat([best, similar], 1)
        indices = torch.cat([indices, places + number * _ROWS_AT_ONCE], 1)
        best, order = best.topk(min(k, best.shape[1]))
        indices = indices.gather(1, order)
    return best.cpu(), indices.cpu()
