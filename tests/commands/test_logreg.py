"""The classifier predicts what scikit-learn's does, and C is chosen on train."""

import json
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from ldae import distributed
from ldae.commands.logreg import LogregProtocol, logistic_regression, logreg
from ldae.errors import InputError
from ldae.evals import evaluation, logistic
from ldae.evals.evaluation import Setup
from ldae.evals.features import Features, image_names
from ldae.evals.subsets import draw_images, fold_splits, held_out

SETUP = Setup(in_chans=1, workers=0, device="cpu")
NAMES = [str(i) for i in range(300)]
SHORT = LogregProtocol(C=(1e-6, 1e-3, 0.1, 10.0))


def exact(C: float) -> LogisticRegression:
    """With few images and C = 1e-6, scikit-learn's L-BFGS ends before it converges."""
    return LogisticRegression(C=C, solver="newton-cg", tol=1e-9, max_iter=1000)


def by_hand(train: Features, chosen: torch.Tensor, graded: Features, C: float) -> float:
    """Return top-1 in percent."""
    model = exact(C)
    model.fit(np.float64(train.features[chosen]), train.labels[chosen].numpy())
    return 100 * model.score(np.float64(graded.features), graded.labels.numpy())


def part(features: Features, chosen: torch.Tensor) -> Features:
    return Features(features.features[chosen], features.labels[chosen])


def test_grid_is_dinov2s():
    protocol = LogregProtocol()
    assert len(protocol.C) == 45 and (protocol.max_iter, protocol.tol) == (1000, 1e-12)
    assert np.log10(protocol.C) == pytest.approx([-6 + 0.25 * i for i in range(45)])


@pytest.mark.parametrize("classes", [2, 4])
def test_it_equals_scikit_learn_called_by_hand(cloud, classes):
    train, evaluation = cloud(300, 0, classes), cloud(90, 1, classes)
    held = held_out(NAMES, train.labels, 10)
    whole = torch.ones(300, dtype=torch.bool)
    found = logistic_regression(train, evaluation, whole, [(~held, held)], SHORT)
    wanted = [by_hand(train, ~held, part(train, held), C) for C in SHORT.C]
    assert [one["held_out_top1"] for one in found["sweep"]] == pytest.approx(wanted)
    assert found["C"] == SHORT.C[int(np.argmax(wanted))]
    assert found["top1"] == pytest.approx(by_hand(train, whole, evaluation, found["C"]))
    assert 100 / classes < found["top1"] < 100  # so that the test can fail
    few = draw_images(NAMES, train.labels, 5, 0, 0)
    folds = fold_splits(NAMES, train.labels, few, 5)
    found = logistic_regression(train, evaluation, few, folds, SHORT)
    fold_of = sum(i * held[few].int() for i, (_, held) in enumerate(folds))
    drawn = part(train, few)
    wanted = [
        100 * (predicted == drawn.labels.numpy()).mean()
        for C in SHORT.C
        for predicted in [
            cross_val_predict(
                exact(C),
                np.float64(drawn.features),
                drawn.labels.numpy(),
                cv=PredefinedSplit(fold_of.numpy()),
            )
        ]
    ]
    assert [one["held_out_top1"] for one in found["sweep"]] == pytest.approx(wanted)
    assert found["C"] == SHORT.C[int(np.argmax(wanted))]
    assert found["top1"] == pytest.approx(by_hand(train, few, evaluation, found["C"]))


@pytest.mark.parametrize("shots", [1, 3])
def test_a_draw_learns_from_its_own_labels_only(shots, tmp_path, monkeypatch):
    """The labels of images that are not drawn do not matter, and one shot has C = 1."""
    protocol = LogregProtocol(C=(1e-5, 1e-3, 0.1), shots=(shots,), draws=2)

    def draws(permuted: bool) -> dict:
        original = evaluation.extract_share
        setup = replace(SETUP, out=tmp_path / "out")

        def features(encoder, source):
            found = original(encoder, source)
            if not permuted or source.split != "train":
                return found
            drawn = [draw_images(image_names(source), found.labels, shots, n, 0) for n in range(2)]
            labels = found.labels.roll(1).where(~(drawn[0] | drawn[1]), found.labels)
            return found._replace(labels=labels)

        monkeypatch.setattr(evaluation, "extract_share", features)
        results = logreg("pixels:4", "digits", protocol=protocol, setup=setup)["results"]
        monkeypatch.setattr(evaluation, "extract_share", original)
        return results["draws"]

    found = draws(permuted=False)
    assert found == draws(permuted=True)
    if shots == 1:
        assert found["C_1shot"] == [1.0, 1.0]


def test_C_is_chosen_on_train_only(cloud):
    train, evaluation = cloud(300, 0), cloud(90, 1)
    held = held_out(NAMES, train.labels, 10)
    wrong = evaluation._replace(labels=evaluation.labels.roll(1))
    honest, permuted = (
        logistic_regression(train, graded, ~held | held, [(~held, held)], SHORT)
        for graded in (evaluation, wrong)
    )
    assert permuted["sweep"] == honest["sweep"] and permuted["C"] == honest["C"]
    assert permuted["top1"] < honest["top1"]


def test_fits_that_do_not_converge_are_recorded_silently(cloud):
    train = cloud(300, 0)
    held = held_out(NAMES, train.labels, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = logistic_regression(
            train, train, ~held | held, [(~held, held)], LogregProtocol(C=(1e-3, 0.1), max_iter=8)
        )
    assert found["unconverged"] == [0.1]
    assert [one["converged"] for one in found["sweep"]] == [True, False]


def test_classes_without_train_images_count_as_errors_and_top5_counts_five(cloud):
    train = cloud(300, 0, classes=8)
    seen = train.labels % 4 != 1

    def accuracies(graded: Features) -> list[float]:
        found = logistic_regression(train, graded, seen, [], SHORT)
        return [found["top1"], found["top5"]]

    assert accuracies(part(train, ~seen)) == [0.0, 0.0]
    model = exact(1.0)
    model.fit(np.float64(train.features[seen]), train.labels[seen].numpy())
    scores = model.decision_function(np.float64(train.features[seen]))
    first = model.classes_[np.argsort(-scores, axis=1)] == train.labels[seen].numpy()[:, None]
    wanted = [100 * first[:, :n].any(1).mean() for n in (1, 5)]
    assert accuracies(part(train, seen)) == pytest.approx(wanted)


def test_a_fit_may_take_longer_than_the_ranks_wait_for_each_other(cloud, on_ranks, monkeypatch):
    """The second rank has no image of the draw, and all results are those of one rank."""
    train, test = cloud(60, 0), cloud(30, 1)
    few = torch.arange(60) % 4 == 0
    splits = [
        (few & (torch.arange(60) % 8 == i), few & (torch.arange(60) % 8 != i)) for i in (0, 4)
    ]
    alone = logistic_regression(train, test, few, splits, SHORT)
    original, wait = logistic.minimize, 1.5  # seconds

    def slowly(losses, *args):
        def loss(points, indices):
            time.sleep(wait / 20)
            return losses(points, indices)

        return original(loss, *args)

    def work():
        with distributed.process_group(torch.device("cpu"), rank_timeout=wait / 60):
            mine = slice(distributed.rank(), None, 2)
            shares = [Features(*(part[mine] for part in share[:2])) for share in (train, test)]
            started = time.monotonic()
            assert logistic_regression(*shares, few, splits, SHORT) == alone
            assert time.monotonic() - started > wait

    monkeypatch.setattr(logistic, "minimize", slowly)
    assert on_ranks(work) == ["", ""]


def test_unlearnable_labels_are_refused(cloud):
    train = cloud(20, 0)
    one = train.labels == 0
    with pytest.raises(InputError, match="of one class"):
        logistic_regression(train, train, one | ~one, [(one, ~one)], SHORT)


def test_the_command_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    protocol = LogregProtocol(C=(1e-3, 1.0), shots=(5,), draws=2)
    record = logreg("pixels:4", "digits", protocol=protocol, setup=SETUP)
    name = "logreg-digits-shots=5-draws=2-C=0.001-1.0-in_chans=1"
    written = tmp_path / "evals" / "pixels-4" / name / "results.json"
    assert json.loads(written.read_text()) == record
    results, protocol = record["results"], record["protocol"]
    assert results["top1"] > results["top1_5shot"] > 30 and len(results["draws"]["C_5shot"]) == 2
    assert (protocol["name"], protocol["normalisation"]) == ("dinov2", "none")
    assert [protocol[name] for name in ("version", "folds", "C_of_one_shot")] == [3, 5, 1.0]


def test_too_few_images_are_refused_before_extraction(monkeypatch):
    monkeypatch.setattr("ldae.evals.evaluation.extract_share", None)
    with pytest.raises(InputError, match="fewer than 500 shots"):
        logreg("pixels:8", "digits", protocol=LogregProtocol(shots=(500,)), setup=SETUP)
    with pytest.raises(InputError, match="C must be above 0, not 0"):
        LogregProtocol(C=(0.0,))
