"""Every pre-training measures its features without labels, and reports what is wrong with them."""

import pytest
import torch

from ldae import tree
from ldae.commands.pretrain import pretrain
from ldae.method import LDAE
from ldae.pretraining import online_features
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import KINDS
from ldae.runs.metrics import read_records
from ldae.train.interrupt import Interrupted
from ldae.train.plan import Plan

NAMES = ("rankme", "spread", "psnr_25", "psnr_50", "psnr_75")
WATCHED = {"system__watch_every": 16, "system__log_every": 2, "optim__epochs": 2}
SYMPTOMS = ("the features have collapsed", "the run stands still", "the loss stands still")


def measured(run):
    """Return the images seen and the values of all measurements of a run."""
    records = [record for record in read_records(run) if "rankme" in record]
    return [(record["images"], *(record[name] for name in NAMES)) for record in records]


def test_a_run_measures_its_features_and_reconstructions(tiny, tmp_path, capsys):
    pretrain(tiny(**WATCHED), tmp_path / "run", "l_dae")
    values = measured(tmp_path / "run")
    assert [images for images, *_ in values] == list(range(16, 129, 16))
    for _, rank, spread, *psnr in values:
        assert 1 < rank <= 32 and 0 < spread < 2 and min(psnr) > 0  # features have 32 numbers
    assert values[-1][4] > values[0][4]
    assert not any(symptom in capsys.readouterr().out for symptom in SYMPTOMS)


@pytest.mark.parametrize("epoch, every", [(64, 4096), (100_000, 25_000)])
def test_by_default_features_are_measured_four_times_an_epoch_and_not_too_often(
    epoch, every, tiny, tmp_path
):
    config, plan = tiny(system__watch_every="auto"), Plan(epoch, 8 * epoch, 8, 1)
    arguments = config, plan, tmp_path, torch.device("cpu"), None, None
    assert [hook.every for hook in online_features.watch(*arguments)] == [every]


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        ("l_dae_masked", {}),
        ("l_dae_masked", {"features__share": 0.5}),
        ("ddpm", {"unet__dropout": 0.1}),
        ("l_dae_single", {}),
    ],
)
def test_measurements_change_no_weight(row, changes, tiny, tmp_path):
    config = tiny(row, **WATCHED, **changes, optim__ema=0.9)
    pretrain(config, tmp_path / "watched", row)
    pretrain(tree.replace(config, {"system.watch_every": 0}), tmp_path / "plain", row)
    assert len(measured(tmp_path / "watched")) == 8 and measured(tmp_path / "plain") == []
    watched, plain = (Checkpoints(tmp_path / name).load() for name in ("watched", "plain"))
    for part in ("model", "average"):
        assert all(torch.equal(watched[part][name], plain[part][name]) for name in plain[part])


def test_a_resumed_run_measures_and_reports_what_an_undisturbed_one_does(
    tiny, tmp_path, interrupts, capsys
):
    """The learning rate is too low to move anything, which is reported once."""
    config = tiny(**WATCHED, optim__blr=1e-12)
    pretrain(config, tmp_path / "whole", "l_dae")
    sentences = [line for line in capsys.readouterr().out.splitlines() if SYMPTOMS[1] in line]
    interrupts(LDAE, 5, 11)
    for seen in (40, 88):
        with pytest.raises(Interrupted, match=f"at image {seen} of"):
            pretrain(config, tmp_path / "parts", "l_dae")
    pretrain(config, tmp_path / "parts", "l_dae")
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")
    again = [line for line in capsys.readouterr().out.splitlines() if SYMPTOMS[1] in line]
    assert again == sentences and len(sentences) == 1
    assert "from image 16 to 48," in sentences[0]


def test_a_planted_collapse_is_reported_once(tiny, tmp_path, monkeypatch, capsys):
    """From step 5 on, the encoder sees nothing of the images."""
    steps = []

    def collapse(method):
        steps.append(1)
        if len(steps) > 4:
            torch.nn.init.zeros_(method.denoiser.embed.weight)

    monkeypatch.setattr(LDAE, "after_step", collapse)
    pretrain(tiny(**WATCHED), tmp_path / "run", "l_dae")
    sentences = [line for line in capsys.readouterr().out.splitlines() if SYMPTOMS[0] in line]
    assert len(sentences) == 1 and "at image 48 " in sentences[0]


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_ranks_measure_what_one_does(fsdp, tiny, tmp_path, on_ranks):
    """The weights in training are measured, not their average."""
    config = tiny(**WATCHED, optim__blr=1e-3, optim__ema=0.99)
    config = tree.replace(config, {"tokenizer.fit_images": 32})
    pretrain(config, tmp_path / "one", "l_dae")
    shared = tree.replace(config, {"system.fsdp": fsdp})
    assert on_ranks(lambda: pretrain(shared, tmp_path / "two", "l_dae")) == ["", ""]
    for one, two in zip(measured(tmp_path / "one"), measured(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-2)


def test_the_values_are_those_of_the_backbone_that_graders_get(method, images):
    trained = method("l_dae")
    opening = KINDS["pretraining"].functions()
    values = online_features.measure(trained, opening, images, torch.device("cpu"))
    features = trained.features(trained.tokenizer.normalize(images), t=10)
    unit = features / features.norm(dim=1, keepdim=True)
    expected = unit.std(0, correction=0).mean().item() * 32**0.5
    assert values["spread"] == pytest.approx(expected, rel=1e-3)
    clean, _, shown = trained.denoise_images(images, torch.arange(8), t=500)
    error = (shown - clean).square().mean().log10().item()
    assert values["psnr_50"] == pytest.approx(-10 * error, rel=1e-3)


def test_too_little_memory_costs_a_measurement_and_not_the_run(tiny, tmp_path, monkeypatch, capsys):
    def measure(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(online_features, "measure", measure)
    pretrain(tiny(**WATCHED), tmp_path / "run", "l_dae")
    assert read_records(tmp_path / "run")[-1]["images"] == 128
    assert measured(tmp_path / "run") == []
    assert "cpu has too little memory left to measure the features" in capsys.readouterr().out
