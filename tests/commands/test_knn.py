"""The vote is DINO's, and k-NN needs enough images."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldae.commands.knn import knn
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.features import Features
from ldae.evals.neighbours import KNNProtocol, knn_accuracy, vote
from ldae.evals.subsets import draw_images, grade_draws

SETUP = Setup(in_chans=1, workers=0, device="cpu")


def cloud(count: int, classes: int, seed: int, dim: int = 5) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    noise = torch.randn(count, dim, generator=generator)
    return Features(noise + torch.eye(classes, dim)[labels], labels)


def slow_knn(
    train: Features, evaluation: Features, k: int, temperature: float, others: bool = False
) -> tuple:
    """Vote as in DINO's eval_knn.py, one image and one neighbour at a time."""
    classes = int(train.labels.max()) + 1
    unit = train.features.double() / train.features.double().norm(dim=1, keepdim=True)
    labels = train.labels.tolist()
    hits1 = hits5 = 0
    for number, (query, label) in enumerate(zip(*evaluation[:2])):
        similarity = (unit @ (query / query.norm()).double()).tolist()
        nearest = sorted(range(len(unit)), key=lambda i: -similarity[i])
        nearest = [i for i in nearest if not others or i != number][:k]
        scores = [0.0] * classes
        for i in nearest:
            scores[labels[i]] += math.exp(similarity[i] / temperature)
        order = sorted(range(classes), key=lambda c: -scores[c])
        hits1 += int(label) == order[0]
        hits5 += int(label) in order[: min(5, k)]
    return 100 * hits1 / len(evaluation.labels), 100 * hits5 / len(evaluation.labels)


@pytest.mark.parametrize(("classes", "dim"), [(3, 3), (9, 12)])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_equals_brute_force_for_every_k(search, classes, dim, temperature):
    train, evaluation = cloud(150, classes, 0, dim), cloud(60, classes, 1, dim)
    ks = (1, 3, 20, 150)
    found = knn_accuracy(train, evaluation, KNNProtocol(k=ks, temperature=temperature))
    for k in ks:
        top1, top5 = slow_knn(train, evaluation, k, temperature)
        assert found[f"top1_k{k}"] == pytest.approx(top1)
        assert found[f"top5_k{k}"] == pytest.approx(top5)
    assert 100 / classes < found["top1_k20"] < 100  # the clouds overlap, so the test can fail


def test_leave_one_out_equals_brute_force_with_duplicates(search):
    """Every image occurs twice, with different labels, and is as near to a query as itself."""
    train = cloud(150, 4, 0)
    train = train._replace(features=train.features[:75].repeat(2, 1))
    ks = (1, 3, 9, 149)
    found = knn_accuracy(train, train, KNNProtocol(k=ks, leave_one_out=True))
    for k in ks:  # odd, because rounding decides which of two equals is the last
        top1, top5 = slow_knn(train, train, k, 0.07, others=True)
        assert found[f"top1_k{k}"] == pytest.approx(top1)
        assert found[f"top5_k{k}"] == pytest.approx(top5)
    assert found["top1_k1"] < 100


def test_leave_one_out_needs_another_image():
    train = cloud(20, 2, 0)
    knn_accuracy(train, train, KNNProtocol(k=(19,), leave_one_out=True))
    with pytest.raises(
        InputError, match="k = 20 is more .* there are 20, one of which is the query"
    ):
        knn_accuracy(train, train, KNNProtocol(k=(20,), leave_one_out=True))


def test_few_shot_equals_knn_of_the_drawn_images(search):
    train, evaluation = cloud(150, 4, 0), cloud(60, 4, 1)
    protocol = KNNProtocol(k=(3, 10), shots=(5, 10), draws=3, seed=7)
    names = [str(i) for i in range(150)]

    def grade(chosen):
        return knn_accuracy(train, evaluation, protocol, chosen=chosen)

    found = grade_draws(protocol, names, train.labels, grade)
    for shots in (5, 10):
        tops = []
        for number in range(3):
            chosen = draw_images(names, train.labels, shots, number, 7).nonzero()[:, 0]
            few = Features(train.features[chosen], train.labels[chosen])
            assert len(chosen) == 4 * shots
            tops.append(slow_knn(few, evaluation, 10, 0.07)[0])
        assert found["draws"][f"top1_k10_{shots}shot"] == pytest.approx(tops)
        assert found[f"top1_k10_{shots}shot"] == pytest.approx(sum(tops) / 3)
        assert found[f"top1_k10_{shots}shot_std"] == pytest.approx(statistics.stdev(tops))


def test_vote_keeps_the_order_at_any_temperature():
    similarities = torch.tensor([[0.9, 0.8, 0.8]])
    labels = torch.tensor([[0, 1, 1]])
    assert vote(similarities, labels, 3, 1.0).argmax() == 1
    assert vote(similarities, labels, 3, 1e-4).argmax() == 0
    weights = vote(similarities, labels, 3, 0.5)[0] * math.exp(0.9 / 0.5)
    assert weights.tolist() == pytest.approx([math.exp(1.8), 2 * math.exp(1.6), 0.0])


def test_an_image_is_its_own_nearest_neighbour():
    train = cloud(80, 4, 0)
    assert knn_accuracy(train, train, KNNProtocol(k=(1,)))["top1_k1"] == 100


def test_classes_that_are_not_in_train_count_as_errors():
    train, evaluation = cloud(40, 2, 0), cloud(10, 2, 1)
    unseen = evaluation._replace(labels=torch.full((10,), 5))
    assert knn_accuracy(train, unseen, KNNProtocol(k=(10,)))["top5_k10"] == 0


def test_more_neighbours_than_images_are_refused():
    with pytest.raises(InputError, match="k = 200 is more neighbours than images: there are 150"):
        knn_accuracy(cloud(150, 3, 0), cloud(5, 3, 1))


@pytest.mark.parametrize(
    "wrong", [{"k": ()}, {"k": (0, 10)}, {"temperature": 0.0}, {"shots": (0,)}, {"draws": 0}]
)
def test_wrong_protocols_are_refused(wrong):
    with pytest.raises(InputError, match="must"):
        KNNProtocol(**wrong)


def test_the_command_writes_what_it_returns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record = knn("pixels:8", "digits", protocol=KNNProtocol(k=(1, 20)), setup=SETUP)
    written = tmp_path / "evals" / "pixels-8" / "knn-digits-k=1-20-in_chans=1" / "results.json"
    assert json.loads(written.read_text()) == record
    assert set(record) == {"task", "protocol", "backbone", "data", "results", "environment", "call"}
    assert record["protocol"]["k"] == [1, 20]
    assert record["backbone"]["dim"] == 64
    assert record["data"]["classes"] == 10
    assert record["results"]["top1_k20"] > 95  # raw pixels of sklearn's digits
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_control_does_not_overwrite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    control = replace(SETUP, img_size=16, random_init=True)
    knn("test_vit", "digits", protocol=KNNProtocol(k=(5,)), setup=control)
    assert [p.name for p in tmp_path.glob("evals/test_vit/*")] == [
        "knn-digits-random-init-k=5-in_chans=1-img_size=16"
    ]


def test_results_of_other_data_of_the_same_name_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, classes in (("x", 2), ("y", 3)):
        for number in range(4 * classes):
            part = "train" if number < 2 * classes else "val"
            path = Path(place, "set", part, f"class-{number % classes}", f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    for place in ("x", "y", "x", "y"):
        own = Setup(workers=0, device="cpu")
        knn("pixels:8", f"{place}/set", protocol=KNNProtocol(k=(1,)), setup=own)
    paths = sorted(tmp_path.glob("evals/pixels-8/*/results.json"))
    data = [json.loads(path.read_text())["data"] for path in paths]
    assert [(one["spec"], one["classes"]) for one in data] == [("x/set", 2), ("y/set", 3)]


def test_the_command_draws_and_leaves_one_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    protocol = KNNProtocol(k=(5,), shots=(1, 10), draws=2, leave_one_out=True)
    record = knn("pixels:8", "digits", protocol=protocol, setup=SETUP)
    assert record["data"]["eval_images"] == record["data"]["train_images"] == 1348
    results = record["results"]
    assert results["top1_k5_1shot"] < results["top1_k5_10shot"] < results["top1_k5"]
    protocol = record["protocol"]
    assert (protocol["name"], protocol["version"], protocol["seed"]) == ("dino", 1, 0)
    name = "knn-digits-shots=1-10-draws=2-k=5-leave_one_out=True-in_chans=1"
    assert [p.name for p in tmp_path.glob("evals/pixels-8/*")] == [name]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": (5000,)}, "k = 5000 is more neighbours than images: there are 1,348"),
        ({"k": (1348,), "leave_one_out": True}, "there are 1,348, one of which is the query"),
        ({"k": (11,), "shots": (1, 5)}, "k = 11 .* there are 10$"),
        ({"k": (5,), "shots": (500,)}, r"class '\w+' has \d+ train images, fewer than 500 shots"),
    ],
)
def test_too_few_images_are_refused_before_extraction(given, message, monkeypatch):
    monkeypatch.setattr(
        "ldae.evals.evaluation.extract_share", None
    )  # calling it would be a TypeError
    with pytest.raises(InputError, match=message):
        knn("pixels:8", "digits", protocol=KNNProtocol(**given), setup=SETUP)


def test_default_k_that_the_images_do_not_allow_are_left_out(tmp_path, capsys):
    def graded(images, **given):
        setup = Setup(out=tmp_path / "out", workers=0, device="cpu")
        protocol = KNNProtocol(**given)
        return knn("pixels:32", f"scattered-digits:{images}", protocol=protocol, setup=setup)

    record = graded(67)
    assert record["protocol"]["k"] == [10, 20]
    assert record["protocol"]["modified"] == ["k=10-20"]
    assert set(record["results"]) == {"top1_k10", "top5_k10", "top1_k20", "top5_k20"}
    assert "k = 100, 200 left out: there are 67 images" in capsys.readouterr().out
    assert graded(20, leave_one_out=True)["protocol"]["k"] == [10]
    with pytest.raises(InputError, match="k = 10 is more neighbours than images: there are 9"):
        graded(9)
    with pytest.raises(InputError, match="k = 100 is more neighbours than images: there are 67"):
        graded(67, k=(10, 100))


def test_few_shots_leave_no_k_out_of_the_grade_by_all_images(tmp_path, capsys):
    setup = Setup(out=tmp_path / "out", workers=0, device="cpu")
    protocol = KNNProtocol(shots=(1,), draws=2)
    record = knn("pixels:32", "scattered-digits:300", protocol=protocol, setup=setup)
    assert {"top1_k20", "top1_k200", "top1_k10_1shot"} <= record["results"].keys()
    assert "top1_k20_1shot" not in record["results"]
    out = capsys.readouterr().out
    assert "k = 20, 100, 200 left out of the draws: there are 10 images" in out
    assert "top1_k20 " in out and "top1_k10_1shot " in out


def test_leave_one_out_takes_no_other_images():
    with pytest.raises(InputError, match="leave --eval-data out"):
        knn("pixels:8", "digits", "digits", protocol=KNNProtocol(leave_one_out=True), setup=SETUP)
