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
from ldae.evals.subsets import FewShotProtocol, check_shots, grade_draws, held_out
from ldae.tree import COUNT, POSITIVE

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class LogregProtocol(FewShotProtocol):
    """DINOv2's logistic regression, by scikit-learn. Source: DINOv2, eval/log_regression.py."""

    name: Fixed[str] = "dinov2"
    version: Fixed[int] = 1
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
    """One in so many train images, by the hash of its name, is held out to choose C. For a few-shot
    draw, the drawn images are left out of these."""


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

    C is chosen on a held-out tenth of train, then the classifier is fitted to all of train. The
    ranks share the values of C. Memory holds the features of both splits in float32 and in float64.

    Returns: the content of results.json; its results are top-1 and top-5 in percent, the chosen C,
    the held-out top-1 of every C, and the values of C that did not converge.

    Raises: InputError for a backbone or data that cannot be graded.
    """
    with open_evaluation("logreg", backbone, data, eval_data, protocol, setup) as evaluation:
        protocol, device = evaluation.protocol, evaluation.device
        labels = known_labels(evaluation.train)
        held = held_out(image_names(evaluation.train), labels, protocol.held_out)
        check_shots(protocol, labels, evaluation.train.classes)  # before features are extracted
        splits = (evaluation.train, evaluation.eval)
        train, test = (
            gather_features(share, source, device)
            for share, source in zip(evaluation.features(), splits, strict=True)
        )
        results = logistic_regression(train, test, ~held, held, protocol, device)

        def grade(chosen: torch.Tensor) -> dict[str, float]:
            graded = logistic_regression(
                train, test, chosen, held & ~chosen, protocol, device, chosen
            )
            return {name: graded[name] for name in (*protocol.accuracies, "C")}

        results |= grade_draws(protocol, train.names, labels, grade)
        return evaluation.write(results, train.features.shape[1])


def logistic_regression(
    train: Features,
    test: Features,
    fitted: torch.Tensor,
    chooses: torch.Tensor,
    protocol: LogregProtocol = LogregProtocol(),
    device: torch.device = torch.device("cpu"),
    refitted: torch.Tensor | None = None,
) -> dict:
    """Return top-1 and top-5 on ``test`` in percent for the chosen C, and the record of the choice.

    All features are on every rank; the ranks exchange on ``device``.

    Args:
        fitted: bool (N,), the train images that each C is fitted to.
        chooses: bool (N,), the train images that choose C.
        refitted: bool (N,), the train images that the chosen C is fitted to; by default all.

    Raises: InputError when no images choose, or the fitted images are of one class.
    """
    if not chooses.any():
        raise InputError(f"none of {len(train.labels)} train images are left to choose C by")
    if len(train.labels[fitted].unique()) < 2:
        raise InputError("the images to learn from are of one class")
    held = Features(train.features[chooses], train.labels[chooses], [])
    outcomes = torch.zeros(len(protocol.C), 3, dtype=torch.float64)
    with progress(len(protocol.C), "C") as bar:
        inputs = _inputs(train, fitted)
        for i in range(rank(), len(protocol.C), world_size()):
            model, converged = fit(*inputs, protocol.C[i], protocol)
            outcomes[i] = torch.tensor(
                [grade(model, held)[0], converged, model.n_iter_.max()], dtype=outcomes.dtype
            )
            bar.update(min(world_size(), len(protocol.C) - bar.n))
    outcomes = all_reduce_sum(outcomes.to(device)).cpu().tolist()
    tried = [
        {"C": C, "held_out_top1": top1, "converged": bool(converged), "iterations": int(iterations)}
        for C, (top1, converged, iterations) in zip(protocol.C, outcomes)
    ]
    best = max(tried, key=lambda outcome: (outcome["held_out_top1"], -outcome["C"]))["C"]
    final = torch.zeros(3, dtype=torch.float64)
    if is_main():
        model, converged = fit(*_inputs(train, refitted), best, protocol)
        final = torch.tensor([*grade(model, test), converged], dtype=final.dtype)
    top1, top5, converged = all_reduce_sum(final.to(device)).tolist()
    return {
        "top1": top1,
        "top5": top5,
        "C": best,
        "converged": bool(converged),
        "unconverged": [outcome["C"] for outcome in tried if not outcome["converged"]],
        "sweep": tried,
    }


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


def grade(model: LogisticRegression, features: Features) -> tuple[float, float]:
    """Return top-1 and top-5 in percent; a class that the model has not seen is never found."""
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
    return top_n(torch.cat(placed), 1), top_n(torch.cat(placed), 5)


def _inputs(train: Features, chosen: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    chosen = slice(None) if chosen is None else chosen
    return train.features[chosen].double().numpy(), train.labels[chosen].numpy()
