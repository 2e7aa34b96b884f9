"""``ldae logreg``: grade a backbone by logistic regression on its frozen features."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
from tyro.conf import Fixed

from ldae.errors import InputError
from ldae.evals.evaluation import EvalSourceSpec, FeaturesSourceSpec, FeaturesSpec, Setup
from ldae.evals.features import Features, image_names, known_labels
from ldae.evals.heads import count_hits, grade_heads
from ldae.evals.logistic import LogisticRegression
from ldae.evals.open import data_of, open_evaluation
from ldae.evals.predictions import Predictions
from ldae.evals.seeds import over_seeds
from ldae.evals.subsets import FewShotProtocol, check_draws, fold_splits, grade_draws, held_out
from ldae.evals.taps import Tap
from ldae.tree import COUNT, POSITIVE


@dataclass(frozen=True)
class LogregProtocol(FewShotProtocol):
    """DINOv2's logistic regression. Source: DINOv2, eval/log_regression.py."""

    shares_features = True
    name: Fixed[str] = "dinov2"
    version: Fixed[int] = 3
    """Version 2 used scikit-learn, whose solver often ends at max_iter before it converges. Where
    both converge, at most 1 prediction in 1,000 differs. Version 1 also chose the C of a draw on
    the held-out tenth of all train labels."""
    C: Annotated[tuple[float, ...], POSITIVE] = tuple((10 ** np.linspace(-6, 5, 45)).tolist())
    """Inverse strengths of the L2 penalty; one is chosen on a held-out tenth of train."""
    # Every fit starts at zero: the result of a fit that max_iter ends depends on its start.
    max_iter: Annotated[Fixed[int], COUNT] = 1000
    tol: Annotated[Fixed[float], POSITIVE] = 1e-12
    solver: Fixed[str] = "lbfgs"
    precision_of_fit: Fixed[str] = "float64"
    normalisation: Fixed[str] = "none"
    """Normalisation of features: none, as in DINOv2, because the grid of C fits raw features."""
    held_out: Fixed[int] = 10
    """One in so many train images, by the hash of its name, is held out to choose C."""
    folds: Fixed[int] = 5
    """Folds that choose the C of a few-shot draw: stratified, by the hash of names, as many as
    the shots if these are fewer."""
    C_of_one_shot: Fixed[float] = 1.0


@over_seeds
def logreg(
    backbone: FeaturesSpec,
    /,
    data: FeaturesSourceSpec = None,
    eval_data: EvalSourceSpec = None,
    *,
    protocol: LogregProtocol = LogregProtocol(),
    predictions: bool = False,
    setup: Setup = Setup(),
) -> dict:
    """Grade a backbone by logistic regression on its frozen features.

    C is chosen on a held-out tenth of train, then the classifier is fitted to all of train. A
    few-shot draw chooses C by cross-validation within the drawn images. All values of C are fitted
    together; each rank computes with its share of the images, which memory holds in float32 and, of
    train, in float64.

    Args:
        predictions: write the predicted class of each image to predictions.npz, beside
            results.json.

    Returns: the content of results.json; its results are top-1 and top-5 in percent, the chosen C,
    the held-out top-1 of every C, and the values of C that did not converge.

    Raises: InputError for a backbone or data that cannot be graded.

    Examples:
        >>> protocol = ldae.LogregProtocol(shots=(1, 5), draws=5)
        >>> ldae.logreg("runs/l_dae", "/data/imagenet", protocol=protocol)["results"]["top1"]
    """
    data = data_of(backbone, data)
    with open_evaluation(
        "logreg", backbone, data, eval_data, protocol, setup, predictions=predictions
    ) as evaluation:
        protocol, device = evaluation.protocol, evaluation.device
        labels, names = known_labels(evaluation.train), image_names(evaluation.train)
        held = None if protocol.only_shots else held_out(names, labels, protocol.held_out)
        classes = evaluation.train.classes
        check_draws(protocol, labels, classes, predictions)  # before features are extracted
        train, test = evaluation.features()
        fit = partial(logistic_regression, train, test, protocol=protocol, device=device)
        predicted = Predictions(evaluation.eval, device) if predictions else None
        results = {}
        if held is not None:
            everything = torch.ones_like(held)
            results = fit(everything, [(~held, held)], predicted=predicted)

        def grade(chosen: torch.Tensor) -> dict[str, float]:
            graded = fit(chosen, fold_splits(names, labels, chosen, protocol.folds))
            return {key: graded[key] for key in (*protocol.accuracies, "C")}

        results |= grade_draws(protocol, names, labels, grade)
        record = evaluation.write(results, train.features.shape[1])
        if predicted:
            predicted.save(evaluation.folder)
        return record


def logistic_regression(
    train: Features,
    test: Features,
    chosen: torch.Tensor,
    splits: list[tuple[torch.Tensor, torch.Tensor]],
    protocol: LogregProtocol = LogregProtocol(),
    device: torch.device = torch.device("cpu"),
    predicted: Predictions | None = None,
) -> dict:
    """Return top-1 and top-5 on ``test`` in percent for the best C, and the record of the choice.

    Both are this rank's share. All ranks return the same.

    Args:
        chosen: bool (N,), the train images of all ranks that the best C is fitted to.
        splits: pairs of bool (N,): chosen images to fit every C to, and train images that choose C.
            Without splits C is ``protocol.C_of_one_shot``.
        predicted: gets the predicted classes.

    Raises: InputError when the images to fit to are of one class.
    """
    images = LogisticRegression(train, chosen, device)
    tried = _try(images, train, splits, protocol) if splits else []
    best = protocol.C_of_one_shot
    if tried:
        best = max(tried, key=lambda outcome: (outcome["held_out_top1"], -outcome["C"]))["C"]
    (final,) = images.fit([chosen], [best], protocol.max_iter, protocol.tol)
    top1, top5 = grade_heads({Tap(): final.classifiers}, test, device)[Tap()][0].tolist()
    if predicted:
        predicted.classify("top1", final.classifiers, test)
    return {
        "top1": top1,
        "top5": top5,
        "C": best,
        "converged": bool(final.converged),
        "unconverged": [outcome["C"] for outcome in tried if not outcome["converged"]],
        "sweep": tried,
    }


def _try(
    images: LogisticRegression,
    train: Features,
    splits: list[tuple[torch.Tensor, torch.Tensor]],
    protocol: LogregProtocol,
) -> list[dict]:
    """Return for every C its top-1 over the held-out images of all splits, and its convergence."""
    subsets, held = zip(*splits)
    if any(len(images.labels[subset].unique()) < 2 for subset in subsets):
        raise InputError("the images to learn from are of one class")
    fits = images.fit(subsets, protocol.C, protocol.max_iter, protocol.tol)
    graded = [
        count_hits({Tap(): fit.classifiers}, train, images.device, part)
        for fit, part in zip(fits, held)
    ]
    hits = sum(counts[Tap()][:, 0] for counts, _ in graded)
    top1 = 100 * hits / sum(count for _, count in graded)
    converged = torch.stack([fit.converged for fit in fits]).all(0)
    iterations = torch.stack([fit.iterations for fit in fits]).amax(0)
    outcomes = zip(protocol.C, top1.tolist(), converged.tolist(), iterations.tolist())
    return [
        dict(zip(("C", "held_out_top1", "converged", "iterations"), outcome))
        for outcome in outcomes
    ]
