"""``ldae knn``: grade a backbone by its nearest neighbours."""

from dataclasses import replace
from typing import Annotated

import torch
import tyro

from ldae.errors import InputError
from ldae.evals.evaluation import BackboneSpec, Setup, SourceSpec, open_evaluation
from ldae.evals.features import Encoder, known_labels, names, own_rows
from ldae.evals.neighbours import KNNProtocol, check_enough, knn_accuracy
from ldae.evals.subsets import check_shots, few_shot


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
    with open_evaluation(
        "knn", backbone, data, data if leave_one_out else eval_data, setup
    ) as graded:
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
