"""An MAE goes on from a run, from its export and from a published checkpoint."""

import pytest
import timm
import torch
from mae_layout import LIKE_PUBLISHED
from safetensors.torch import load_file

from ldae.backbones.open import load_backbone
from ldae.backbones.run import load_method
from ldae.commands.export import export
from ldae.commands.pretrain import pretrain
from ldae.errors import InputError
from ldae.mae.network import build
from ldae.mae.open import backbone_of
from ldae.mae.start import open_start, start_from
from ldae.settings import UNNAMED_SIZES
from ldae.tree import put


@pytest.fixture
def trained(tiny_mae, tmp_path):
    """A run of a few steps."""
    pretrain(tiny_mae(optim__epochs=0.5), tmp_path / "trained", "mae")
    return tmp_path / "trained"


def test_a_run_and_its_export_are_gone_on_with(trained, tiny_mae, tmp_path, images):
    first, _ = load_method(trained, "mae")
    exported = export(trained, tmp_path / "exported")
    for spec in (trained, exported):
        config = put(tiny_mae(seed=5), UNNAMED_SIZES | {"init_from": str(spec)})
        config, start = open_start(config, tmp_path / "new")
        mae = build(config)
        fresh = {name: value.clone() for name, value in mae.decoder.state_dict().items()}
        start_from(mae, start)
        state, wanted = mae.state_dict(), first.state_dict()
        for name in wanted:
            if name.startswith("decoder.") and spec == exported:
                assert torch.equal(state[name], fresh[name.removeprefix("decoder.")])
            else:
                torch.testing.assert_close(state[name], wanted[name], rtol=1e-5, atol=1e-6)
    second = tiny_mae(init_from=str(trained), optim__epochs=0.25, optim__warmup_epochs=0)
    pretrain(second, tmp_path / "second", "mae")
    gone_on, state = load_method(tmp_path / "second", "mae")
    assert state["images_seen"] == 16
    weight = first.encoder.blocks[0].mlp.fc1.weight
    assert 0 < (gone_on.encoder.blocks[0].mlp.fc1.weight - weight).norm() < weight.norm()
    assert torch.equal(gone_on.pixels.pixel_mean, first.pixels.pixel_mean.round(decimals=6))


@pytest.mark.parametrize("decoder", [True, False])
def test_a_published_checkpoint_is_gone_on_with(decoder, published, tiny_mae, tmp_path, images):
    spec = published(decoder)
    config, start = open_start(tiny_mae(init_from=spec, **LIKE_PUBLISHED), tmp_path / "new")
    mae = build(config)
    assert bool(start.decoder) == decoder
    start_from(mae, start)
    assert mae.pixels.pixel_mean.tolist() == [0.5] * 3  # timm's of the name
    assert config.data.mean == config.data.std == (0.5,) * 3
    graded = load_backbone(spec, img_size=64)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():  # but for the positions, which timm resizes
        graded.pos_embed.copy_(mae.encoder.pos_embed)
        torch.testing.assert_close(backbone_of(mae)(x), graded(x))
    run = tmp_path / "run"
    pretrain(tiny_mae(init_from=spec, optim__epochs=0.5, **LIKE_PUBLISHED), run, "mae")
    weights = load_file(export(run, tmp_path / "exported") / "model.safetensors")
    assert weights.keys() == timm.create_model("test_vit", num_classes=0).state_dict().keys()


def test_what_is_no_mae_of_these_sizes_is_refused(trained, published, tiny_mae, tmp_path, run):
    def refused(spec, sentence, **changes):
        with pytest.raises(InputError, match=sentence) as error:
            config, start = open_start(tiny_mae(init_from=str(spec), **changes), tmp_path / "new")
            start_from(build(config), start)
        assert len(str(error.value).splitlines()) == 1

    shape = "holds an encoder of another shape than this run's: blocks.0.attn.proj.bias is"
    refused(trained, "embed_dim is 64, but init_from .* has 32", model__embed_dim=64)
    refused(trained, "decoder of another shape.*: blocks.1.attn.* missing", model__decoder_depth=1)
    refused(trained, "num_heads is 4, but init_from .* has 2", model__num_heads=4)
    refused(trained, r"data.mean is \(0.5, 0.5, 0.5\), but init_from .* has", data__mean=(0.5,) * 3)
    refused(published(width=32), rf"{shape} \(32,\) there, \(64,\) here", **LIKE_PUBLISHED)
    refused(published(depth=5), r"blocks.5.attn.* is missing there", **LIKE_PUBLISHED)
    refused(f"{published()}-no", "there is no checkpoint file .*pth-no", **LIKE_PUBLISHED)
    (tmp_path / "other.pth").touch()
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    refused(f"test_vit@{tmp_path / 'other.pth'}", "does not hold the weights of a published MAE")
    refused(f"tset_vit@{tmp_path / 'other.pth'}", "no timm model of that name; the nearest is 't")
    refused(tmp_path, "holds neither a run nor the config.json")
    refused(run(), "is no ViT with a class token")
    learned = tmp_path / "learned.pth"
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), learned)
    refused(f"test_vit@{learned}", "has learned positions, and an MAE has sine", **LIKE_PUBLISHED)
