"""A pre-training of MAE measures its features and reconstructions, and reports a collapse."""

import torch

from ldae.commands.pretrain import pretrain
from ldae.mae.network import MAE
from ldae.runs.metrics import read_records

WATCHED = {"system__watch_every": 16, "system__log_every": 2, "optim__epochs": 3}


def test_a_planted_collapse_is_reported_and_a_healthy_run_is_not(
    tiny_mae, tmp_path, monkeypatch, capsys
):
    pretrain(tiny_mae(**WATCHED), tmp_path / "healthy", "mae")
    assert "collapsed" not in (out := capsys.readouterr().out) and "stands still" not in out
    values = [record["psnr_50"] for record in read_records(tmp_path / "healthy")]
    assert len(values) == 12 and values[-1] > values[0]
    steps = []

    def collapse(mae):
        steps.append(1)
        if len(steps) > 4:
            torch.nn.init.zeros_(mae.encoder.patch_embed.proj.weight)

    monkeypatch.setattr(MAE, "after_step", collapse, raising=False)
    pretrain(tiny_mae(**WATCHED), tmp_path / "run", "mae")
    out = capsys.readouterr().out
    assert out.count("the features have collapsed: at image 48 ") == out.count("collapsed") == 1


def test_more_masked_patches_are_reconstructed_worse(mae, images):
    network = mae()
    from ldae.mae.open import OPENING

    errors = []
    for level in (0.25, 0.5, 0.75):
        shown, clean = OPENING.reconstruct(network, images, torch.arange(8), level)
        hidden = (shown != clean).any(1).float().mean().item()
        assert abs(hidden - level) < 0.1
        errors.append((shown - clean).square().mean().item())
    assert errors == sorted(errors)
