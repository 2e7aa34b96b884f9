"""``ldae knn``: grade a backbone by its nearest neighbours."""

from dataclasses import replace
from functools import partial

from ldae.data.source import Source
from ldae.errors import InputError
from ldae.evals.evaluation import EvalSourceSpec, FeaturesSourceSpec, FeaturesSpec, Setup
from ldae.evals.features import image_names, known_labels
from ldae.evals.neighbours import KNNProtocol, knn_accuracy, limit_k
from ldae.evals.open import data_of, labelled_splits, open_evaluation
from ldae.evals.predictions import Predictions
from ldae.evals.seeds import over_seeds
from ldae.evals.subsets import check_draws, grade_draws
from ldae.evals.whitening import whitening_of


@over_seeds
def knn(
    backbone: FeaturesSpec,
    /,
    data: FeaturesSourceSpec = None,
    eval_data: EvalSourceSpec = None,
    *,
    protocol: KNNProtocol = KNNProtocol(),
    predictions: bool = False,
    setup: Setup = Setup(),
) -> dict:
    """Grade a backbone by its nearest neighbours, without any training.

    Args:
        predictions: write the predicted class of each image to predictions.npz, beside
            results.json.

    Returns: the content of results.json; its results are top-1 and top-5 in percent for every k.

    Raises: InputError for a backbone or data that cannot be graded.

    Examples:
        >>> record = ldae.knn("runs/l_dae", "/data/imagenet", protocol=ldae.KNNProtocol(k=(20,)))
        >>> record["results"]["top1_k20"]
    """
    data, others = data_of(backbone, data), protocol.leave_one_out
    if others and eval_data:
        raise InputError("leave-one-out classifies the train split: leave --eval-data out")
    splits = _queries_from_train if others else labelled_splits
    with open_evaluation(
        "knn", backbone, data, eval_data, protocol, setup, splits, predictions=predictions
    ) as evaluation:
        protocol, labels = evaluation.protocol, known_labels(evaluation.train)
        classes = evaluation.train.classes
        check_draws(protocol, labels, classes, predictions)  # before features are extracted
        whole, few = limit_k(protocol, len(labels)), protocol
        if protocol.shots:
            fewest = min(protocol.shots) * len(labels.unique())
            few = limit_k(protocol, fewest, " of the draws")
        evaluation = replace(evaluation, protocol=few if protocol.only_shots else whole)
        train, test = evaluation.features()
        whitening = whitening_of(train, protocol, evaluation.device)
        grade = partial(knn_accuracy, train, test, device=evaluation.device, whitening=whitening)
        predicted = Predictions(evaluation.eval, evaluation.device) if predictions else None
        results = {} if protocol.only_shots else grade(whole, predictions=predicted)
        names = image_names(evaluation.train)
        results |= grade_draws(few, names, labels, lambda chosen: grade(few, chosen=chosen))
        record = evaluation.write(results, train.features.shape[1])
        if predicted:
            predicted.save(evaluation.folder)
        return record


def _queries_from_train(data: str, _: None) -> tuple[Source, Source]:
    """Return the train split as the images to search and as those to grade."""
    train, _ = labelled_splits(data, data)  # data need not have an evaluation split
    return train, train
