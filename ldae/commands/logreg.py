"""``ldae logreg``: grade a backbone by logistic regression on its frozen features."""

import warnings
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from tyro.conf import Fixed

from ldae.console import progress
from ldae.distributed import all_reduce_sum, is_main, rank, world_size
from ldae.errors import InputError
from ldae.evals.accuracy import label_ranks, top_n
from ldae.evals.evaluation import BackboneSpec, EvalSourceSpec, Setup, SourceSpec, open_evaluation
from ldae.evals.features import Features, gather_features, image_names, known_labels
from ldae.evals.subsets import FewShotProtocol, check_shots, fold_splits, grade_draws, held_out
from ldae.tree import COUNT, POSITIVE

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class LogregProtocol(FewShotProtocol):
    """DINOv2's logistic regression, by scikit-learn. Source: DINOv2, eval/log_regression.py."""

    name: Fixed[str] = "dinov2"
    version: Fixed[int] = 2
    """Version 1 chose the C of a draw on the held-out tenth of all train labels."""
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


def logreg(
    backbone: BackboneSpec,
    /,
    data: SourceSpec,
    eval_data: EvalSourceSpec = None,
    *,
    protocol: LogregProtocol = LogregProtocol(),
    setup: Setup = Setup(),
) -> dict:
    """Grade a backbone by logistic regression on its frozen features.

    C is chosen on a held-out tenth of train, then the classifier is fitted to all of train. A
    few-shot draw chooses C by cross-validation within the drawn images. The ranks share the values
    of C. Memory holds the features of both splits in float32 and in float64.

    Returns: the content of results.json; its results are top-1 and top-5 in percent, the chosen C,
    the held-out top-1 of every C, and the values of C that did not converge.

    Raises: InputError for a backbone or data that cannot be graded.
    """
    with open_evaluation("logreg", backbone, data, eval_data, protocol, setup) as evaluation:
        protocol, device = evaluation.protocol, evaluation.device
        labels, names = known_labels(evaluation.train), image_names(evaluation.train)
        held = held_out(names, labels, protocol.held_out)
        check_shots(protocol, labels, evaluation.train.classes)  # before features are extracted
        splits = (evaluation.train, evaluation.eval)
        train, test = (
            gather_features(share, source, device)
            for share, source in zip(evaluation.features(), splits, strict=True)
        )
        everything = torch.ones_like(held)
        results = logistic_regression(train, test, everything, [(~held, held)], protocol, device)

        def grade(chosen: torch.Tensor) -> dict[str, float]:
            folds = fold_splits(names, labels, chosen, protocol.folds)
            graded = logistic_regression(train, test, chosen, folds, protocol, device)
            return {key: graded[key] for key in (*protocol.accuracies, "C")}

        results |= grade_draws(protocol, names, labels, grade)
        return evaluation.write(results, train.features.shape[1])


def logistic_regression(
    train: Features,
    test: Features,
    chosen: torch.Tensor,
    splits: list[tuple[torch.Tensor, torch.Tensor]],
    protocol: LogregProtocol = LogregProtocol(),
    device: torch.device = torch.device("cpu"),
) -> dict:
    """Return top-1 and top-5 on ``test`` in percent for the best C, and the record of the choice.

    All features are on every rank; the ranks exchange on ``device``.

    Args:
        chosen: bool (N,), the train images that the best C is fitted to.
        splits: pairs of bool (N,): train images to fit every C to, and train images that choose C.
            Without splits C is ``protocol.C_of_one_shot``.

    Raises: InputError when the images to fit to are of one class.
    """
    tried = _try(train, splits, protocol, device) if splits else []
    best = protocol.C_of_one_shot
    if tried:
        best = max(tried, key=lambda outcome: (outcome["held_out_top1"], -outcome["C"]))["C"]
    final = torch.zeros(3, dtype=torch.float64)
    if is_main():
        model, converged = fit(*_inputs(train, chosen), best, protocol)
        placed = label_ranks_of(model, test)
        final = torch.tensor([top_n(placed, 1), top_n(placed, 5), converged], dtype=final.dtype)
    top1, top5, converged = all_reduce_sum(final.to(device)).tolist()
    return {
        "top1": top1,
        "top5": top5,
        "C": best,
        "converged": bool(converged),
        "unconverged": [outcome["C"] for outcome in tried if not outcome["converged"]],
        "sweep": tried,
    }


def _try(
    train: Features,
    splits: list[tuple[torch.Tensor, torch.Tensor]],
    protocol: LogregProtocol,
    device: torch.device,
) -> list[dict]:
    """Return for every C its top-1 over the held-out images of all splits, and its convergence."""
    if any(len(train.labels[fitted].unique()) < 2 for fitted, _ in splits):
        raise InputError("the images to learn from are of one class")
    parts = [
        (_inputs(train, fitted), Features(train.features[held], train.labels[held]))
        for fitted, held in splits
    ]
    outcomes = torch.zeros(len(protocol.C), 3, dtype=torch.float64)
    with progress(len(protocol.C), "C") as bar:
        for i in range(rank(), len(protocol.C), world_size()):
            fits = [(*fit(*inputs, protocol.C[i], protocol), held) for inputs, held in parts]
            placed = torch.cat([label_ranks_of(model, held) for model, _, held in fits])
            converged = all(converged for _, converged, _ in fits)
            iterations = max(model.n_iter_.max() for model, _, _ in fits)
            outcomes[i] = torch.tensor(
                [top_n(placed, 1), converged, iterations], dtype=outcomes.dtype
            )
            bar.update(min(world_size(), len(protocol.C) - bar.n))
    outcomes = all_reduce_sum(outcomes.to(device)).cpu().tolist()
    return [
        {"C": C, "held_out_top1": top1, "converged": bool(converged), "iterations": int(iterations)}
        for C, (top1, converged, iterations) in zip(protocol.C, outcomes)
    ]


def fit(
    features: np.ndarray, labels: np.ndarray, C: float, protocol: LogregProtocol
) -> tuple[LogisticRegression, bool]:
    """Fit scikit-learn's classifier to float64 (N, D); return it, and whether it converged."""
    model = LogisticRegression(
        C=C, solver=protocol.solver, max_iter=protocol.max_iter, tol=protocol.tol
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, labels)
    return model, not caught


def label_ranks_of(model: LogisticRegression, features: Features) -> torch.Tensor:
    """Return the rank of each true class; a class that the model has not seen is never found."""
    classes = int(max(model.classes_.max(), features.labels.max())) + 1
    placed = []
    blocks = features.features.split(_ROWS_AT_ONCE), features.labels.split(_ROWS_AT_ONCE)
    for rows, labels in zip(*blocks):
        seen = torch.from_numpy(model.decision_function(rows.double().numpy()))
        if seen.ndim == 1:  # with two classes, only the score of the second
            seen = torch.stack([-seen, seen], 1)
        scores = seen.new_full((len(rows), classes), torch.nan)
        scores[:, torch.from_numpy(model.classes_)] = seen
        placed.append(label_ranks(scores, labels))
    return torch.cat(placed)


def _inputs(train: Features, chosen: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return train.features[chosen].double().numpy(), train.labels[chosen].numpy()
