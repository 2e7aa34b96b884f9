from dataclasses import replace

"""The probe learns what one head alone learns, chooses on train, and folds into timm exactly."""

import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F

from ldae.backbone import load_backbone
from ldae.errors import InputError
from ldae.evals.accuracy import ranks, top
from ldae.evals.features import Features, extract
from ldae.evals.grading import Setup
from ldae.evals.linear import (
    LinearProtocol,
    fold_batchnorm,
    held_out,
    linear,
    linear_probe,
    save_classifier,
    train_heads,
)

SETUP = Setup(in_chans=1, workers=0, device="cpu")

CPU = torch.device("cpu")
SHORT = LinearProtocol(learning_rates=(0.01, 0.1, 1.0), epochs=3, batch_size=32)


def cloud(count: int, seed: int, classes: int = 4, dim: int = 8) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    noise = 3 + 0.7 * torch.randn(count, dim, generator=generator)
    names = [f"{seed}/{i}" for i in range(count)]
    return Features(noise + torch.eye(classes, dim)[labels], labels, names)


def slow_probe(train: Features, rate: float, protocol: LinearProtocol) -> torch.nn.Sequential:
    """One head as MAE's script writes it: modules, torch's SGD at the rate, a fixed order."""
    generator = torch.Generator().manual_seed(protocol.seed)
    classes = int(train.labels.max()) + 1
    norm = torch.nn.BatchNorm1d(train.features.shape[1], affine=False, eps=1e-6)
    head = torch.nn.Linear(train.features.shape[1], classes)
    torch.nn.init.trunc_normal_(head.weight, std=0.01, generator=generator)
    torch.nn.init.zeros_(head.bias)
    model = torch.nn.Sequential(norm, head)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9)
    generator.manual_seed(protocol.seed)
    steps = len(train.features) // protocol.batch_size
    for epoch in range(protocol.epochs):
        order = torch.randperm(len(train.features), generator=generator)
        for step in range(steps):
            batch = order[step * protocol.batch_size : (step + 1) * protocol.batch_size]
            done = (epoch * steps + step) / (protocol.epochs * steps)
            for group in optimizer.param_groups:
                cosine = 0.5 * (1 + math.cos(math.pi * done))
                group["lr"] = rate * protocol.batch_size / 256 * cosine
            optimizer.zero_grad()
            F.cross_entropy(model(train.features[batch]), train.labels[batch]).backward()
            optimizer.step()
    return model.eval()


def test_heads_together_are_the_head_alone():
    train, queries = cloud(100, 0), cloud(50, 1).features  # a last batch of 4 is left out
    together = train_heads(train, 4, SHORT.learning_rates, SHORT, CPU)(queries)
    for number, rate in enumerate(SHORT.learning_rates):
        alone = slow_probe(train, rate, SHORT)(queries)
        assert torch.allclose(together[:, number], alone, atol=1e-4)
        assert alone.std() > 0.01  # it moved away from where all heads start


def test_diverged_head_leaves_the_others_alone():
    train, queries = cloud(100, 0), cloud(50, 1).features
    alone = train_heads(train, 4, (0.1,), SHORT, CPU)(queries)[:, 0]
    both = train_heads(train, 4, (0.1, float("inf")), SHORT, CPU)(queries)
    assert torch.allclose(both[:, 0], alone, atol=1e-5)
    assert both[:, 1].isnan().any()


@pytest.mark.parametrize("count", [2, 33, 65])
def test_short_last_batches_do_not_spoil_the_statistics(count):
    heads = train_heads(cloud(count, 0), 4, (0.1,), SHORT, CPU)
    assert heads(cloud(9, 1).features).isfinite().all()


def test_same_seed_same_result_other_seed_another():
    train, evaluation = cloud(300, 0), cloud(50, 1)
    first, again, other = (
        linear_probe(train, evaluation, protocol)[0].weight
        for protocol in (SHORT, SHORT, replace(SHORT, seed=1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rate_is_chosen_on_train_only():
    train, evaluation = cloud(300, 0), cloud(90, 1)
    _, honest = linear_probe(train, evaluation, SHORT)
    _, permuted = linear_probe(train, evaluation._replace(labels=evaluation.labels.roll(1)), SHORT)
    assert permuted["learning_rate"] == honest["learning_rate"]
    assert permuted["held_out_top1"] == honest["held_out_top1"]
    assert permuted["top1"] < honest["top1"]


def test_chosen_rate_is_the_best_on_the_held_out_tenth_and_retrained_on_all():
    train, evaluation = cloud(300, 0), cloud(90, 1)
    heads, results = linear_probe(train, evaluation, SHORT)
    assert results["held_out_top1"][str(results["learning_rate"])] == max(
        results["held_out_top1"].values()
    )
    again = train_heads(train, 4, (results["learning_rate"],), SHORT, CPU)
    assert torch.equal(heads.weight, again.weight)
    right = (heads(evaluation.features)[:, 0].argmax(1) == evaluation.labels).double().mean()
    assert results["top1"] == pytest.approx(100 * right.item())


def test_held_out_tenth_is_a_pure_function_of_the_names():
    names = [f"{i}.jpg" for i in range(5000)]
    labels = torch.arange(5000) % 7
    held = held_out(names, labels, SHORT)
    backwards = held_out(names[::-1], labels.flip(0), SHORT)
    assert torch.equal(backwards.flip(0), held)
    assert 0.08 < held.double().mean() < 0.12
    assert held_out(["\udcff.jpg", *names], labels[[0, *range(5000)]], SHORT)[1:].equal(held)


@pytest.mark.parametrize(("count", "classes"), [(1, 1), (2, 2), (60, 60)])
def test_too_few_images_to_choose_are_told(count, classes):
    names = [str(i) for i in range(count)]
    with pytest.raises(InputError, match=f"{count} train images of {classes} classes are too few"):
        held_out(names, torch.arange(count) % classes, SHORT)


@pytest.mark.parametrize(
    "wrong", [{"learning_rates": ()}, {"learning_rates": (0.1, 0.0)}, {"epochs": 0}]
)
def test_wrong_protocols_are_told(wrong):
    with pytest.raises(InputError, match="must be"):
        LinearProtocol(**wrong)


def test_folded_head_is_the_unfolded_one():
    train, queries = cloud(300, 0), cloud(50, 1).features
    heads = train_heads(train, 4, (0.5,), SHORT, CPU)
    folded = fold_batchnorm(heads.norm, heads.weight[0], heads.bias[0])
    assert torch.allclose(F.linear(queries, *folded), heads(queries)[:, 0], atol=1e-4)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_saved_classifier_scores_in_timm_what_the_probe_scored(name, pictures, tmp_path):
    backbone = load_backbone(name, random_init=True, img_size=16)
    train, evaluation = pictures(200), pictures(61, "eval", seed=1)
    fits = [extract(backbone, source, device=CPU) for source in (train, evaluation)]
    heads, results = linear_probe(*fits, SHORT)
    save_classifier(backbone, heads, train.classes, tmp_path / "out", evaluation)
    opened = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    logits = extract(opened, evaluation, device=CPU).features
    assert torch.allclose(logits, heads(fits[1].features)[:, 0], atol=1e-3)
    assert top(ranks(logits, fits[1].labels), 1) == results["top1"]
    assert opened.pretrained_cfg["label_names"] == train.classes
    assert opened.pretrained_cfg["tag"] == "linear"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    again = load_backbone(tmp_path / "out")
    assert torch.equal(extract(again, evaluation, device=CPU).features, fits[1].features)


def test_classifier_that_scores_otherwise_is_not_saved(pictures, tmp_path, monkeypatch):
    backbone = load_backbone("test_vit", random_init=True, img_size=16)
    source = pictures(64)
    heads = train_heads(extract(backbone, source, device=CPU), 3, (0.1,), SHORT, CPU)
    monkeypatch.setattr("ldae.evals.linear.fold_batchnorm", lambda norm, *unfolded: unfolded)
    with pytest.raises(InputError, match="not saved"):
        save_classifier(backbone, heads, None, tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def test_verb_writes_and_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    control = replace(SETUP, img_size=16, random_init=True)
    record = linear("test_vit", "digits", epochs=3, save=tmp_path / "out", setup=control)
    name = "linear-digits-random-init-epochs=3-in_chans=1-img_size=16"
    written = tmp_path / "evals" / "test_vit" / name / "results.json"
    assert json.loads(written.read_text()) == json.loads(json.dumps(record))
    assert record["results"]["top1"] > 30  # of ten classes
    assert record["protocol"]["learning_rates"] == LinearProtocol.learning_rates
    with pytest.raises(InputError, match="exists already"):
        linear("test_vit", "digits", save=tmp_path / "out", setup=control)
    below = linear(str(tmp_path / "out"), "digits", epochs=1, setup=SETUP)
    assert below["backbone"]["dim"] == 64
    assert (
        tmp_path / "out" / "evals" / "linear-digits-epochs=1-in_chans=1" / "results.json"
    ).is_file()


def test_classifier_of_pixels_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("ldae.evals.grading.extract", None)
    with pytest.raises(InputError, match="pixels is no timm model"):
        linear("pixels:8", "digits", save=tmp_path / "out", setup=SETUP)
