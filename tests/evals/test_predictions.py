import numpy as np
import pytest
import torch

from ldae import distributed
from ldae.commands.knn import knn
from ldae.commands.linear import CachedProtocol, MAEProtocol, linear
from ldae.commands.logreg import LogregProtocol, logreg
from ldae.data.open import open_splits
from ldae.evals.evaluation import Setup
from ldae.evals.features import image_names, known_labels
from ldae.evals.neighbours import KNNProtocol
from ldae.evals.predictions import Predictions, count_changed
from ldae.runs import layout

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("grader", "protocol", "accuracies"),
    [
        (knn, KNNProtocol(k=(1, 20)), {"k1": "top1_k1", "k20": "top1_k20"}),
        (knn, KNNProtocol(k=(5,), leave_one_out=True), {"k5": "top1_k5"}),
        (linear, CachedProtocol(epochs=2, blocks=(0, 1)), {"top1": "top1"}),
        (linear, MAEProtocol(epochs=1, warmup_epochs=0, total_batch=128), {"top1": "top1"}),
        (logreg, LogregProtocol(C=(0.1, 10.0), max_iter=20), {"top1": "top1"}),
    ],
)
def test_the_accuracy_is_that_of_the_predictions(grader, protocol, accuracies, tmp_path):
    setup = Setup(random_init=True, in_chans=1, img_size=16, workers=0, device="cpu", out=tmp_path)
    results = grader("test_vit", "digits", protocol=protocol, predictions=True, setup=setup)
    train, test = open_splits("digits", None)
    source = train if getattr(protocol, "leave_one_out", False) else test
    with np.load(tmp_path / layout.PREDICTIONS) as kept:
        assert kept.keys() == {"names", "labels", "classes", *accuracies}
        assert kept["names"].tolist() == image_names(source)
        assert kept["labels"].tolist() == known_labels(source).tolist()
        assert kept["classes"].tolist() == list(source.classes)
        for name, accuracy in accuracies.items():
            share = 100 * np.mean(kept[name] == kept["labels"])
            assert share == pytest.approx(results["results"][accuracy])
    grader("test_vit", "digits", protocol=protocol, setup=setup)
    assert not (tmp_path / layout.PREDICTIONS).exists()  # those of other weights would stay


def test_equal_scores_give_the_smaller_class_and_undefined_ones_do_not_count(pictures):
    predictions = Predictions(pictures(6), CPU)
    inf, nan = float("inf"), float("nan")  # of a class that was not learned, for example
    scores = torch.tensor([[0.0, 2.0, 2.0], [nan, 1.0, 0.0], [1.0, 1.0, 1.0], [nan, nan, nan]])
    predictions.add("k1", torch.tensor([2, 1, 0, 3]), scores)
    infinite = torch.tensor([[0.0, inf, nan], [-inf, -1.0, nan]])
    predictions.add("k1", torch.tensor([4, 5]), infinite)
    assert predictions.classes["k1"].tolist() == [0, 1, 1, -1, 1, 1]


def test_predictions_of_other_images_are_not_compared(tmp_path):
    for folder, name in (("one", "a.png"), ("same", "a.png"), ("other", "b.png")):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / layout.PREDICTIONS, names=[name], top1=[len(folder)])
    assert count_changed(tmp_path / "one", tmp_path / "same") == {"top1": (1, 1)}
    assert count_changed(tmp_path / "one", tmp_path / "other") == {}


def test_ranks_write_the_predictions_of_all(on_ranks, tmp_path):
    scores = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    (_, source) = open_splits("digits", None)

    def work():
        with distributed.process_group(CPU):
            predictions = Predictions(source, CPU)
            share = torch.arange(distributed.rank(), 9, 2)
            predictions.add("top1", torch.arange(len(share)), scores[share])
            predictions.save(tmp_path)

    assert on_ranks(work) == ["", ""]
    with np.load(tmp_path / layout.PREDICTIONS) as kept:
        assert kept["top1"][:9].tolist() == scores.argmax(1).tolist()
