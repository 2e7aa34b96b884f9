"""A run that starts from an exported backbone starts with its features."""

import pytest
import timm
import torch

from ldae.backbones.fold import init_from, open_exported
from ldae.backbones.run import load_run
from ldae.commands.export import export
from ldae.errors import InputError
from ldae.method import build


@pytest.mark.parametrize("row", ["l_dae", "predict_latent"])
def test_a_run_can_start_from_an_exported_backbone(row, run, tiny, images, tmp_path):
    out = export(run(), tmp_path / "out")
    exported = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    fresh = build(tiny(row))
    fresh.tokenizer.load_state_dict(load_run(tmp_path / "run-l_dae")[0].tokenizer.state_dict())
    init_from(fresh, open_exported(out, fresh))
    x = fresh.tokenizer.normalize(images)
    inside = fresh.tokenizer.decode(fresh.tokenizer.encode(x))
    t = 700  # the same at every t; a row that scales its input sees gamma_t z_0
    gamma = fresh.gamma[t]
    with torch.no_grad():
        centred = inside - fresh.tokenizer.decode(torch.zeros_like(fresh.tokenizer.encode(x)))
        wanted = exported(inside + (gamma - 1) * centred)
        torch.testing.assert_close(fresh.eval().features(x, t), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="another shape"):
        open_exported(out, build(tiny(row, model__depth=3)))
    with pytest.raises(InputError, match="nothing is not an exported backbone"):
        open_exported(tmp_path / "nothing", fresh)
