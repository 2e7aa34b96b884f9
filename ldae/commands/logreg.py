"""``ldae logreg``: logistic regression on frozen features, its penalty chosen on a part of train."""

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
from ldae.evals.accuracy import ranks, top
from ldae.evals.evaluation import BackboneSpec, EvalSourceSpec, Setup, SourceSpec, open_evaluation
from ldae.evals.features import Features, all_rows, known_labels, names
from ldae.evals.subsets import DrawsProtocol, check_shots, few_shot, held_out
from ldae.tree import COUNT, POSITIVE

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class LogregProtocol(DrawsProtocol):
    """DINOv2's logistic regression, by scikit-learn. Source: DINOv2, eval/log_regression.py."""

    name: Fixed[str] = "dinov2"
    version: Fixed[int] = 1
    C: Annotated[tuple[float, ...], POSITIVE] = tuple((10 ** np.linspace(-6, 5, 45)).tolist())
    """Inverse strengths of the L2 penalty, of which one is chosen on a tenth of train."""
    # Each is fitted from zero: where max_iter ends a fit, its result depends on where it began.
    max_iter: Annotated[Fixed[int], COUNT] = 1000
    tol: Annotated[Fixed[float], POSITIVE] = 1e-12
    solver: Fixed[str] = "lbfgs"
    precision_of_fit: Fixed[str] = "float64"
    normalisation: Fixed[str] = "none"
    """Of the features: none, as DINOv2, whose grid of C stands for features as they come."""
    held_out: Fixed[int] = 10
    """One in so many train images, by the hash of its name, chooses C; of a few-shot draw, those of
    them that are not drawn."""


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

    C is chosen on a tenth of train, then all of train is learned from. The features of both splits
    are held in memory twice, in float32 and in float64; the ranks share the values of C.

    Returns: what results.json holds; its results are top-1 and top-5 in percent, the chosen C, the
    top-1 of each on the tenth of train, and the C whose fits did not converge.

    Raises: InputError for a backbone or data that cannot be graded.
    """
    with open_evaluation("logreg", backbone, data, eval_data, protocol, setup) as evaluation:
        protocol, device = evaluation.protocol, evaluation.device
        labels = known_labels(evaluation.train)
        held = held_out(names(evaluation.train), labels, protocol.held_out)
        check_shots(protocol, labels, evaluation.train.classes)  # before the work, not after
        splits = (evaluation.train, evaluation.eval)
        train, test = (
            all_rows(share, source, device)
            for share, source in zip(evaluation.features(), splits, strict=True)
        )
        results = logistic_regression(train, test, ~held, held, protocol, device)

        def grade(chosen: torch.Tensor) -> dict[str, float]:
            found = logistic_regression(
                train, test, chosen, held & ~chosen, protocol, device, chosen
            )
            return {name: found[name] for name in (*protocol.accuracies, "C")}

        results |= few_shot(protocol, train.names, labels, grade)
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
    """Return top-1 and top-5 of the chosen C on ``test`` in percent, and the record of its choice.

    Of the images of ``train`` each C learns from those ``fitted`` (N,), those that ``chooses`` (N,)
    marks choose one C, and the chosen C learns from those ``refitted`` (N,) (None: all). All features are on
    every rank; ``device`` is where the ranks exchange.

    Raises: InputError when no images choose, or those that are learned from are of one class.
    """
    if not chooses.any():
        raise InputError(f"none of {len(train.labels)} train images are left to choose C by")
    if len(train.labels[fitted].unique()) < 2:
        raise InputError("the images that are learned from are of one class")
    judges = Features(train.features[chooses], train.labels[chooses], [])
    found = torch.zeros(len(protocol.C), 3, dtype=torch.float64)
    with progress(len(protocol.C), "C") as bar:
        inputs = _inputs(train, fitted)
        for place in range(rank(), len(protocol.C), world_size()):
            model, converged = fit(*inputs, protocol.C[place], protocol)
            top1, _ = tops(model, judges)
            found[place] = torch.tensor([top1, converged, model.n_iter_.max()], dtype=found.dtype)
            bar.update(min(world_size(), len(protocol.C) - bar.n))
    found = all_reduce_sum(found.to(device)).cpu().tolist()
    tried = [
        {"C": C, "held_out_top1": top1, "converged": bool(converged), "iterations": int(iterations)}
        for C, (top1, converged, iterations) in zip(protocol.C, found)
    ]
    best = max(tried, key=lambda one: (one["held_out_top1"], -one["C"]))["C"]
    final = torch.zeros(3, dtype=torch.float64)
    if is_main():
        model, converged = fit(*_inputs(train, refitted), best, protocol)
        final = torch.tensor([*tops(model, test), converged], dtype=final.dtype)
    top1, top5, converged = all_reduce_sum(final.to(device)).tolist()
    return {
        "top1": top1,
        "top5": top5,
        "C": best,
        "converged": bool(converged),
        "unconverged": [one["C"] for one in tried if not one["converged"]],
        "sweep": tried,
    }


def fit(
    features: np.ndarray, labels: np.ndarray, C: float, protocol: LogregProtocol
) -> tuple[LogisticRegression, bool]:
    """scikit-learn's classifier of float64 ``features`` (N, D), and whether it converged."""
    model = LogisticRegression(
        C=C, solver=protocol.solver, max_iter=protocol.max_iter, tol=protocol.tol
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, labels)
    return model, not told


def tops(model: LogisticRegression, features: Features) -> tuple[float, float]:
    """Top-1 and top-5 in percent; a class that the model has not seen is never found."""
    classes = int(max(model.classes_.max(), features.labels.max())) + 1
    placed = []
    blocks = features.features.split(_ROWS_AT_ONCE), features.labels.split(_ROWS_AT_ONCE)
    for rows, labels in zip(*blocks):
        found = torch.from_numpy(model.decision_function(rows.double().numpy()))
        if found.ndim == 1:  # of two classes, the score of the second
            found = torch.stack([-found, found], 1)
        scores = found.new_full((len(rows), classes), torch.nan)
        scores[:, torch.from_numpy(model.classes_)] = found
        placed.append(ranks(scores, labels))
    return top(torch.cat(placed), 1), top(torch.cat(placed), 5)


def _inputs(train: Features, chosen: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    features, labels = train.features, train.labels
    if chosen is not None:
        features, labels = features[chosen], labels[chosen]
    return features.double().numpy(), labels.numpy()
