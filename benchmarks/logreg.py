"""Compare the logistic regressions of ``ldae logreg`` with scikit-learn's solver, one C at a time.

python benchmarks/logreg.py [--images N] [--test-images N] [--dim D] [--classes K] [--threads N]

Both follow the protocol of ``ldae logreg`` on the same features: all train images, and few-shot
draws. The features are drawn from overlapping normal distributions whose variance falls from axis
to axis, as in the features of networks. The predictions of every fit are compared on the test
images. scikit-learn reports that it has converged also where only its steps have become short;
--exact N compares N values of C with scikit-learn's solver newton-cholesky, which does converge.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression as ScikitLearn
from threadpoolctl import threadpool_limits

from ldae.commands.logreg import LogregProtocol, logistic_regression
from ldae.data.workers import available_cpus
from ldae.evals.features import Features
from ldae.evals.logistic import LogisticRegression
from ldae.evals.subsets import draw_images, fold_splits, held_out
from ldae.files import write_json
from ldae.runs.environment import environment

CPU = torch.device("cpu")
Splits = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Seconds:
    wall: float = 0.0
    cpu: float = 0.0

    def measure(self, work: Callable[[], dict]) -> dict:
        """Add the time of ``work`` and return what it returns."""
        wall, cpu = time.perf_counter(), time.process_time()
        found = work()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return found


def clouds(images: int, dim: int, classes: int, seed: int) -> Features:
    shared, own = (torch.Generator().manual_seed(number) for number in (0, seed))
    means = 0.7 * torch.randn(classes, dim, generator=shared)
    scales = torch.arange(1, dim + 1).float().rsqrt()
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=shared))[0]
    offset = torch.randn(dim, generator=shared)
    labels = torch.randint(classes, (images,), generator=own)
    noise = 4 * torch.randn(images, dim, generator=own)
    return Features((means[labels] + noise) * scales @ turn + offset, labels)


def fit(
    train: Features, chosen: torch.Tensor, C: float, protocol: LogregProtocol, solver: str = "lbfgs"
) -> tuple[ScikitLearn, bool]:
    """Fit scikit-learn's classifier; return it, and whether it reports to have converged."""
    model = ScikitLearn(C=C, solver=solver, max_iter=protocol.max_iter, tol=protocol.tol)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train.features[chosen].double().numpy(), train.labels[chosen].numpy())
    return model, not caught


def by_scikit_learn(
    train: Features, test: Features, chosen: torch.Tensor, splits: Splits, protocol: LogregProtocol
) -> dict:
    """Do what ``logistic_regression`` does; return its main results, and every fit of the sweep."""
    fits, hits = {}, dict.fromkeys(protocol.C, 0)
    for number, (subset, held) in enumerate(splits):
        rows, labels = train.features[held].double().numpy(), train.labels[held].numpy()
        for C in protocol.C:
            fits[number, C] = fit(train, subset, C, protocol)
            hits[C] += int((fits[number, C][0].predict(rows) == labels).sum())
    best = max(protocol.C, key=lambda C: (hits[C], -C))
    model, converged = fit(train, chosen, best, protocol)
    top1 = 100 * model.score(test.features.double().numpy(), test.labels.numpy())
    return {"top1": top1, "C": best, "converged": converged, "fits": fits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--exact", type=int, default=9, help="values of C on the first draw")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/logreg.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    threadpool_limits(args.threads)

    protocol = LogregProtocol()
    train = clouds(args.images, args.dim, args.classes, seed=1)
    test = clouds(args.test_images, args.dim, args.classes, seed=2)
    rows = test.features.double().numpy()
    names = [str(i) for i in range(args.images)]
    held = held_out(names, train.labels, protocol.held_out)
    tasks: dict[str, tuple[torch.Tensor, Splits]] = {
        "all images": (torch.ones_like(held), [(~held, held)])
    }
    for number in range(args.draws):
        drawn = draw_images(names, train.labels, args.shots, number, protocol.seed)
        tasks[f"draw {number}"] = drawn, fold_splits(names, train.labels, drawn, protocol.folds)

    seconds = {"ours": Seconds(), "scikit_learn": Seconds()}
    results, compared, differing, apart = {}, 0, 0, np.zeros(len(protocol.C), int)
    converged_of = np.zeros(len(protocol.C), int)
    for name, (chosen, splits) in tasks.items():
        given = train, test, chosen, splits, protocol
        ours = seconds["ours"].measure(lambda: logistic_regression(*given))
        theirs = seconds["scikit_learn"].measure(lambda: by_scikit_learn(*given))
        sweeps = theirs.pop("fits")
        ours_fits = LogisticRegression(train, chosen, CPU).fit(
            [subset for subset, _ in splits], protocol.C, protocol.max_iter, protocol.tol
        )
        for split, fitted in enumerate(ours_fits):
            predicted = fitted.classifiers(test.features).nan_to_num(-torch.inf).argmax(2).numpy()
            for i, C in enumerate(protocol.C):
                model, converged = sweeps[split, C]
                if converged:
                    differ = int((model.predict(rows) != predicted[:, i]).sum())
                    compared, differing = compared + len(rows), differing + differ
                    converged_of[i] += 1
                    apart[i] += differ
        results[name] = {
            "ours": {key: ours[key] for key in ("top1", "C", "converged")}
            | {"unconverged": len(ours["unconverged"])},
            "scikit_learn": theirs
            | {"unconverged": sum(not converged for _, converged in sweeps.values())},
        }
        print(name, results[name], {way: vars(taken) for way, taken in seconds.items()}, flush=True)

    chosen, _ = tasks["draw 0"]
    some = protocol.C[:: max(len(protocol.C) // args.exact, 1)]
    (fitted,) = LogisticRegression(train, chosen, CPU).fit(
        [chosen], some, protocol.max_iter, protocol.tol
    )
    predicted = fitted.classifiers(test.features).argmax(2).numpy()
    exact = {
        C: int((fit(train, chosen, C, protocol, "newton-cholesky")[0].predict(rows) != mine).sum())
        for C, mine in zip(some, predicted.T)
    }
    record = {
        "what": "seconds of ldae logreg and of scikit-learn's solver under the same protocol",
        **{key: value for key, value in vars(args).items() if key not in ("out", "exact")},
        "seconds": {way: round(taken.wall, 2) for way, taken in seconds.items()},
        "cpu_seconds": {way: round(taken.cpu, 2) for way, taken in seconds.items()},
        "scikit_learn over ours": round(seconds["scikit_learn"].wall / seconds["ours"].wall, 1),
        "cpu of scikit_learn over ours": round(
            seconds["scikit_learn"].cpu / seconds["ours"].cpu, 1
        ),
        "where_scikit_learn_converged": {
            "predictions": compared,
            "differing": differing,
            "fits_and_differing_by_C": {
                f"{C:.3g}": [int(fits), int(differ)]
                for C, fits, differ in zip(protocol.C, converged_of, apart)
            },
        },
        "differing_from_newton_cholesky_by_C": {f"{C:.3g}": differ for C, differ in exact.items()},
        "results": results,
        "environment": environment(CPU),
    }
    write_json(args.out, record)
    print({key: record[key] for key in ("seconds", "cpu_seconds", "scikit_learn over ours")})
    print(record["where_scikit_learn_converged"], exact)


if __name__ == "__main__":
    main()
