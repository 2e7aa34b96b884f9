from dataclasses import replace

"""The vote is DINO's, the search is exact, and k-NN needs enough images."""

import json
import math
import sys

import pytest
import torch

from ldae.errors import InputError
from ldae.evals.features import Features
from ldae.evals.grading import Setup
from ldae.evals.knn import KNNProtocol, knn, knn_accuracy, neighbours, vote

SETUP = Setup(in_chans=1, workers=0, device="cpu")


def cloud(count: int, classes: int, seed: int, dim: int = 5) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    noise = torch.randn(count, dim, generator=generator)
    return Features(noise + torch.eye(classes, dim)[labels], labels, [str(i) for i in range(count)])


def slow_knn(train: Features, evaluation: Features, k: int, temperature: float) -> tuple:
    """DINO's eval_knn.py as its paper says it, one image and one neighbour at a time."""
    classes = int(train.labels.max()) + 1
    unit = [row / row.norm() for row in train.features]
    hits1 = hits5 = 0
    for query, label in zip(evaluation.features, evaluation.labels.tolist()):
        similarity = [float(row @ (query / query.norm())) for row in unit]
        nearest = sorted(range(len(unit)), key=lambda i: -similarity[i])[:k]
        scores = [0.0] * classes
        for i in nearest:
            scores[int(train.labels[i])] += math.exp(similarity[i] / temperature)
        order = sorted(range(classes), key=lambda c: -scores[c])
        hits1 += label == order[0]
        hits5 += label in order[: min(5, k)]
    return 100 * hits1 / len(evaluation.labels), 100 * hits5 / len(evaluation.labels)


@pytest.fixture(params=["faiss", "torch"])
def search(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setitem(sys.modules, "faiss", None)  # makes the import fail
        monkeypatch.setattr("ldae.evals.knn._ROWS_AT_ONCE", 37)  # several blocks
    else:
        import faiss  # noqa: F401  the test is void without it


@pytest.mark.parametrize(("classes", "dim"), [(3, 3), (9, 12)])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_is_brute_force_for_every_k(search, classes, dim, temperature):
    train, evaluation = cloud(150, classes, 0, dim), cloud(60, classes, 1, dim)
    ks = (1, 3, 20, 150)
    found = knn_accuracy(train, evaluation, KNNProtocol(ks, temperature))
    for k in ks:
        top1, top5 = slow_knn(train, evaluation, k, temperature)
        assert found[f"top1_k{k}"] == pytest.approx(top1)
        assert found[f"top5_k{k}"] == pytest.approx(top5)
    assert 100 / classes < found["top1_k20"] < 100  # the clouds overlap, so the test can fail


def test_neighbours_are_exact_in_any_chunk(search):
    train, queries = cloud(100, 3, 0).features, cloud(23, 3, 1).features
    wanted = (queries @ train.T).sort(1, descending=True)
    for chunk in (1, 10, 1000):
        similarities, indices = neighbours(train, queries, 100, chunk)
        assert torch.equal(indices, wanted.indices)
        assert torch.allclose(similarities, wanted.values, atol=1e-5)


def test_vote_keeps_the_order_at_any_temperature():
    similarities = torch.tensor([[0.9, 0.8, 0.8]])
    labels = torch.tensor([[0, 1, 1]])
    assert vote(similarities, labels, 3, 1.0).argmax() == 1
    assert vote(similarities, labels, 3, 1e-4).argmax() == 0
    weights = vote(similarities, labels, 3, 0.5)[0] * math.exp(0.9 / 0.5)
    assert weights.tolist() == pytest.approx([math.exp(1.8), 2 * math.exp(1.6), 0.0])


def test_an_image_is_its_own_nearest_neighbour():
    train = cloud(80, 4, 0)
    assert knn_accuracy(train, train, KNNProtocol((1,)))["top1_k1"] == 100


def test_classes_that_are_not_in_train_are_mistakes():
    train, evaluation = cloud(40, 2, 0), cloud(10, 2, 1)
    unseen = evaluation._replace(labels=torch.full((10,), 5))
    assert knn_accuracy(train, unseen, KNNProtocol((10,)))["top5_k10"] == 0


def test_more_neighbours_than_images_are_told():
    with pytest.raises(InputError, match="k = 200 is more neighbours than images"):
        knn_accuracy(cloud(150, 3, 0), cloud(5, 3, 1))


@pytest.mark.parametrize("wrong", [{"k": ()}, {"k": (0, 10)}, {"temperature": 0.0}])
def test_wrong_protocols_are_told(wrong):
    with pytest.raises(InputError, match="must be"):
        KNNProtocol(**wrong)


def test_verb_writes_what_it_returns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record = knn("pixels:8", "digits", k=(1, 20), setup=SETUP)
    written = tmp_path / "evals" / "pixels-8" / "knn-digits-k=1-20-in_chans=1" / "results.json"
    assert json.loads(written.read_text()) == json.loads(json.dumps(record))
    assert set(record) == {"task", "protocol", "backbone", "data", "results", "environment"}
    assert record["protocol"]["k"] == (1, 20)
    assert record["backbone"]["dim"] == 64
    assert record["data"]["classes"] == 10
    assert record["results"]["top1_k20"] > 95  # of pixels on sklearn's digits
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_control_does_not_overwrite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    knn("test_vit", "digits", k=(5,), setup=replace(SETUP, img_size=16, random_init=True))
    assert [p.name for p in tmp_path.glob("evals/test_vit/*")] == [
        "knn-digits-random-init-k=5-in_chans=1-img_size=16"
    ]


def test_too_few_images_are_told_before_the_work(monkeypatch):
    monkeypatch.setattr("ldae.evals.grading.extract", None)  # calling it would be a TypeError
    with pytest.raises(InputError, match="more neighbours than images"):
        knn("pixels:8", "digits", k=(5000,), setup=SETUP)
