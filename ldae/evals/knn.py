"""The weighted k-nearest-neighbour classifier of DINO, searched exactly."""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
import tyro

from ldae.distributed import all_reduce_sum
from ldae.errors import InputError
from ldae.evals.accuracy import ranks
from ldae.evals.draws import DrawsProtocol, check_shots, few_shot
from ldae.evals.features import Encoder, Features, gathered, known_labels, names, own_rows
from ldae.evals.grading import BackboneSpec, Setup, SourceSpec, grading
from ldae.evals.heads import images_of
from ldae.evals.neighbours import Bank, check_enough


@dataclass(frozen=True)
class KNNProtocol(DrawsProtocol):
    """Every constant of the number. Source: DINO, eval_knn.py; draws: DINOv2, eval/knn.py."""

    name: str = "dino"
    version: int = 1
    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    leave_one_out: bool = False
    """Each train image is classified by the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
    leave_one_out: bool = False,
    shots: tuple[int, ...] = (),
    draws: int = KNNProtocol.draws,
    setup: Annotated[Setup, tyro.conf.arg(name="")] = Setup(),
) -> dict:
    """Grade a backbone by its nearest neighbours, without any training.

    Args:
        backbone: a run folder, an exported folder, a timm name, NAME@FILE or pixels[:SIZE].
        data: the labelled images whose train split is searched.
        eval_data: the images to classify instead of the evaluation split of data.
        k: numbers of neighbours, each graded.
        temperature: a neighbour of cosine similarity s has the weight exp(s / temperature).
        leave_one_out: classify each train image by the others instead.
        shots: numbers of train images of each class, each graded beside all of train.
        draws: of each number of shots, by --seed; their mean and spread are reported.
        setup: how the backbone is opened and run.

    Returns: what results.json holds; its results are top-1 and top-5 in percent for every k.

    Raises: InputError for a backbone or data that can not be graded.
    """
    protocol = KNNProtocol(
        k=tuple(k),
        temperature=temperature,
        leave_one_out=leave_one_out,
        shots=tuple(shots),
        draws=draws,
        seed=setup.seed,
    )
    if leave_one_out and eval_data:
        raise InputError("leave-one-out classifies the train split: leave --eval-data out")
    with grading("knn", backbone, data, data if leave_one_out else eval_data, setup) as graded:
        if leave_one_out:
            graded = replace(graded, eval=graded.train)
        labels = known_labels(graded.train)
        check_shots(protocol, labels, graded.train.classes)  # before the work, not after
        for images in (len(labels), *(n * len(labels.unique()) for n in protocol.shots)):
            check_enough(max(protocol.k), images, leave_one_out)
        encoder = Encoder(graded.model, graded.device, setup.precision)
        train = own_rows(encoder, graded.train, setup.batch_size, setup.workers)
        evaluation = train
        if not leave_one_out:
            evaluation = own_rows(encoder, graded.eval, setup.batch_size, setup.workers)

        def grade(chosen: torch.Tensor | None = None) -> dict[str, float]:
            return knn_accuracy(train, evaluation, protocol, graded.device, chosen)

        results = grade() | few_shot(protocol, names(graded.train), labels, grade)
        return graded.write(protocol, results, train.features.shape[1])


def knn_accuracy(
    train: Features,
    evaluation: Features,
    protocol: KNNProtocol = KNNProtocol(),
    device: torch.device = torch.device("cpu"),
    chosen: torch.Tensor | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 in percent for every k, as ``top1_k20``, from one search.

    Both are this rank's share; ``chosen`` (N,) tells which of all train images are searched.
    Top-5 looks at as many classes as there are, and as there are neighbours, where that is fewer.

    Raises: InputError when there are more neighbours than images.
    """
    images, queries = (images_of(share, device) for share in (train, evaluation))
    labels = gathered(train.labels, images, device)
    classes = int(labels.max()) + 1
    hits = torch.zeros(len(protocol.k), 2, dtype=torch.int64)
    bank = Bank(train, device, chosen)
    for found in bank.nearest(evaluation, max(protocol.k), others=protocol.leave_one_out):
        wanted, labels_of_found = evaluation.labels[found.queries], labels[found.numbers]
        for row, k in enumerate(protocol.k):
            near = found.similarities[:, :k], labels_of_found[:, :k]
            placed = ranks(vote(*near, classes, protocol.temperature), wanted)
            hits[row] += torch.stack([(placed < n).sum() for n in (1, min(5, k))])
    shares = 100 * all_reduce_sum(hits.to(device)).cpu().double() / queries
    return {
        f"top{n}_k{k}": share
        for k, row in zip(protocol.k, shares.tolist())
        for n, share in zip((1, 5), row)
    }


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
