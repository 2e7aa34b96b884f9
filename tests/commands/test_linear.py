"""The sweep chooses on train and reports the last epoch; each protocol does what it says."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldae import cli
from ldae.commands.linear import CachedProtocol, LDAEProtocol, MAEProtocol, linear, linear_probe
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.heads import train_heads
from ldae.evals.subsets import held_out
from ldae.evals.taps import Tap

SETUP = Setup(in_chans=1, workers=0, device="cpu")
CONTROL = replace(SETUP, img_size=16, random_init=True)
CPU = torch.device("cpu")
ONE_EPOCH = CachedProtocol(epochs=1)
SHORT = CachedProtocol(
    learning_rates=(0.01, 0.1, 1.0), weight_decays=(0.0, 0.1), epochs=3, total_batch=32
)


def probe(train, evaluation, protocol=SHORT):
    names = [str(i) for i in range(len(train.labels))]
    held = held_out(names, train.labels, protocol.held_out)
    return linear_probe(train, evaluation, held, 4, protocol)


def test_the_result_depends_on_the_seed_only(cloud):
    train, evaluation = cloud(300, 0), cloud(50, 1)
    first, again, other = (
        probe(train, evaluation, protocol)[0].weight
        for protocol in (SHORT, SHORT, replace(SHORT, seed=1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_head_is_chosen_on_train_only(cloud):
    train, evaluation = cloud(300, 0), cloud(90, 1)
    _, honest = probe(train, evaluation)
    _, permuted = probe(train, evaluation._replace(labels=evaluation.labels.roll(1)))
    assert permuted["learning_rate"] == honest["learning_rate"]
    assert permuted["sweep"] == honest["sweep"]
    assert permuted["top1"] < honest["top1"]


def test_the_chosen_head_is_best_on_the_held_out_tenth_and_trained_again_on_all(cloud):
    """One of two taps has no information about the classes."""
    split = {Tap(0, "avg"): slice(0, 4), Tap(1, "avg"): slice(4, 8)}
    train, evaluation = (cloud(*size)._replace(columns=split) for size in ((300, 0), (90, 1)))
    protocol = replace(SHORT, blocks=(0, 1), pools=("avg",))
    heads, results = probe(train, evaluation, protocol)
    assert len(results["sweep"]) == 12 and results["tap"] == "block 0, avg"
    chosen = {key: results[key] for key in ("tap", "learning_rate", "weight_decay")}
    best = max(results["sweep"], key=lambda head: head["held_out_top1"])
    assert best == chosen | {"held_out_top1": best["held_out_top1"]}
    wanted = next(head for head in protocol.heads if head.record() == chosen)
    again = train_heads(train, [wanted], 4, protocol, CPU)[wanted.tap]
    assert torch.equal(heads.weight, again.weight)
    logits = heads(evaluation.features[:, :4])[:, 0]
    right = (logits.argmax(1) == evaluation.labels).double().mean()
    assert results["top1"] == pytest.approx(100 * right.item())


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rates": ()}, {"learning_rates": (0.1, 0.0)}, {"epochs": 0}, {"pools": ()}],
)
def test_wrong_protocols_are_refused(wrong):
    with pytest.raises(InputError, match="must"):
        CachedProtocol(**wrong)


def test_rates_are_the_papers():
    mae, paper = MAEProtocol(), LDAEProtocol()
    assert mae.blr * mae.total_batch / 256 == pytest.approx(6.4)
    assert paper.blr * paper.total_batch / 256 == pytest.approx(6.4e-3)


def test_the_command_writes_and_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = linear(
        "test_vit",
        "digits",
        protocol=CachedProtocol(epochs=3),
        save=tmp_path / "out",
        setup=CONTROL,
    )
    name = "linear-digits-random-init-epochs=3-in_chans=1-img_size=16"
    written = tmp_path / "evals" / "test_vit" / name / "results.json"
    assert json.loads(written.read_text()) == record
    assert record["results"]["top1"] > 30  # of ten classes
    protocol = record["protocol"]
    assert protocol["learning_rates"] == list(CachedProtocol.learning_rates)
    assert (protocol["name"], protocol["modified"]) == ("cached", ["epochs=3"])
    with pytest.raises(InputError, match="exists already"):
        linear("test_vit", "digits", save=tmp_path / "out", setup=CONTROL)
    below = linear(str(tmp_path / "out"), "digits", protocol=ONE_EPOCH, setup=SETUP)
    assert below["backbone"]["dim"] == 64
    assert (
        tmp_path / "out" / "evals" / "linear-digits-epochs=1-in_chans=1" / "results.json"
    ).is_file()


def test_the_command_sweeps_blocks_and_pools(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taps = CachedProtocol(epochs=1, blocks=(0, -1), pools=("avg", "cls+avg"))
    record = linear("test_vit", "digits", protocol=taps, setup=CONTROL)
    assert len({head["tap"] for head in record["results"]["sweep"]}) == 4
    assert record["backbone"]["dim"] == (128 if "cls" in record["results"]["tap"] else 64)
    name = "linear-digits-random-init-epochs=1-blocks=0--1-pools=avg-cls+avg-in_chans=1-img_size=16"
    assert [path.name for path in tmp_path.glob("evals/test_vit/*")] == [name]
    blocks = CachedProtocol(epochs=1, blocks=(0, -1))
    of_blocks = linear("test_vit", "digits", protocol=blocks, setup=CONTROL)
    assert of_blocks["protocol"]["pools"] == ["avg"]
    with pytest.raises(InputError, match="--save needs the model's own output"):
        linear("test_vit", "digits", protocol=taps, save=tmp_path / "out", setup=CONTROL)


def test_the_command_runs_protocols_of_a_fixed_rate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    protocol = LDAEProtocol(epochs=2, warmup_epochs=1, optimizer="adamw")
    record = linear("test_vit", "digits", protocol=protocol, save=tmp_path / "out", setup=CONTROL)
    assert record["task"] == "linear-ldae" and record["protocol"]["name"] == "ldae"
    assert sorted(record["protocol"]["modified"]) == [
        "epochs=2", "optimizer=adamw", "warmup_epochs=1",
    ]  # fmt: skip
    results = record["results"]
    assert (results["batch"], results["batchnorm_batch"]) == (1024, 512)
    assert results["learning_rate"] == pytest.approx(1e-4 * 1024 / 256)
    printed = capsys.readouterr().out
    assert "1,348 train images are fewer than a batch of 16,384; a batch is 1,024 here" in printed
    again = linear(str(tmp_path / "out"), "digits", protocol=ONE_EPOCH, setup=SETUP)
    assert again["backbone"]["params"] == record["backbone"]["params"]


@pytest.mark.parametrize(
    ("protocol", "given", "message"),
    [
        (MAEProtocol, {"epochs": 5}, "warmup_epochs must be fewer than epochs: 10 of 5"),
        (MAEProtocol, {"total_batch": 700}, "total_batch 700 is not a multiple"),
        (
            CachedProtocol,
            {"blocks": (1,), "pools": ("default",)},
            "block 1 has no pooling of its own",
        ),
        (
            CachedProtocol,
            {"blocks": (7,), "pools": ("avg",)},
            "test_vit has blocks 0 to 5, or -6 to -1, and no block 7",
        ),
    ],
)
def test_wrong_settings_are_refused_before_extraction(protocol, given, message, monkeypatch):
    monkeypatch.setattr("ldae.evals.evaluation.extract_share", None)
    monkeypatch.setattr("ldae.commands.linear.train_on_augmented", None)
    with pytest.raises(InputError, match=message):
        linear("test_vit", "digits", protocol=protocol(**given), setup=CONTROL)


@pytest.mark.parametrize(
    "given",
    [{"save": Path(__file__, "out")}, {"setup": replace(CONTROL, out=Path(__file__, "out"))}],
)
def test_folders_that_cannot_be_written_are_refused_before_extraction(given, monkeypatch):
    monkeypatch.setattr("ldae.evals.evaluation.extract_share", None)
    with pytest.raises(InputError, match="cannot be written"):
        linear("test_vit", "digits", **{"setup": CONTROL} | given)


def test_flags_of_another_protocol_are_refused(capsys):
    argv = ["linear", "test_vit", "--data", "digits"]
    for given, message in (
        (
            ["--protocol", "mae", "--learning-rates", "1"],
            "the protocol mae of linear has no setting learning_rates",
        ),
        (["--protocol=ldae", "--pools=avg"], "the protocol ldae of linear has no setting pools"),
        (["--optimizer", "sgd"], "the protocol cached of linear has no setting optimizer"),
        (["--protocol", "mea"], "linear has no protocol 'mea'; the nearest is 'mae'"),
    ):
        assert cli.main([*argv, *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(message, line)


def test_few_updates_are_reported(cloud, capsys):
    for total_batch, reported in ((50, True), (5, False)):
        protocol = CachedProtocol(epochs=3, total_batch=total_batch)
        linear_probe(cloud(150, 0), cloud(20, 1), torch.arange(150) % 10 == 0, 4, protocol)
        assert ("updates are few" in capsys.readouterr().out) == reported


def test_a_classifier_of_pixels_is_refused_before_extraction(tmp_path, monkeypatch):
    monkeypatch.setattr("ldae.evals.evaluation.extract_share", None)
    with pytest.raises(InputError, match="raw pixels are none"):
        linear("pixels:8", "digits", save=tmp_path / "out", setup=SETUP)
