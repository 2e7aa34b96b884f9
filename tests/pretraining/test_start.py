"""A pre-training goes on from any plain ViT of timm, and its export is that ViT again."""

import pytest
import timm
import torch

import ldae
from ldae.backbones.fold import fold, init_from
from ldae.backbones.open import load_backbone
from ldae.backbones.run import load_method
from ldae.commands.export import export
from ldae.commands.pretrain import pretrain
from ldae.errors import InputError
from ldae.method import build
from ldae.patches import sincos_positions
from ldae.pretraining import recipes
from ldae.pretraining.start import open_start
from ldae.runs.kinds import settings_of
from ldae.settings import UNNAMED_SIZES
from ldae.tree import flatten, put, replace

# Architectures by the name that timm has for them, and what it does not say at this size.
ARCHITECTURES = {
    "mae": ("vit_base_patch16_224", {"pos_embed": "sincos"}),
    "dino": ("vit_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {}),
    "deit": ("deit_tiny_patch16_224", {"num_classes": 7, "dynamic_img_size": True}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "clip of timm": ("vit_base_patch16_clip_224", {"norm_layer": "layernorm"}),
}
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STATISTICS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


@pytest.fixture
def start(awake, tmp_path):
    """start(architecture): a folder of timm with a random ViT, whose blocks all do something."""

    def make(architecture: str, name: str = "", **changes):
        model, given = ARCHITECTURES.get(architecture, (architecture, {}))
        args = SIZES | given | changes
        constant = args.pop("pos_embed", "") == "sincos"
        vit = awake(timm.create_model(model, **args))
        if constant:
            with torch.no_grad():
                vit.pos_embed[0, 1:] = sincos_positions(vit.embed_dim, vit.patch_embed.grid_size[0])
        vit.pretrained_cfg |= STATISTICS
        folder = tmp_path / (name or "start")
        timm.models.save_for_hf(vit, str(folder), model_args=args, safe_serialization=True)
        return folder

    return make


@pytest.fixture
def started(tiny, fitted, images, tmp_path):
    """started(spec, row): the settings and the network of a run at its start."""

    def make(spec, row: str = "l_dae", **changes):
        config = put(tiny(row, **changes), UNNAMED_SIZES | {"init_from": str(spec)})
        config, vit = open_start(config, tmp_path / "new")
        method = build(config, num_classes=3).eval()
        stats = config.data.mean, config.data.std
        method.tokenizer.fit([images], *stats)
        init_from(method, vit)
        return config, method

    return make


def tokens_of(vit, x):
    """Return the patch tokens of timm's ViT."""
    with torch.no_grad():
        return vit.forward_features(x)[:, vit.num_prefix_tokens :]


def error(actual, expected):
    return (actual - expected).norm() / expected.norm()


ROWS = {
    "latent input": ("patch_pca", {}),
    "image input": ("l_dae", {}),
    "pixel tokenizer": ("dae", {}),
    "averaged pixels": ("predict_latent", {"tokenizer__name": "pixel", "tokenizer__dim": 12}),
    "labels": ("no_input_scaling", {"model__class_conditional": True}),
    "masked": ("l_dae_masked", {}),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tokens_are_timms_on_the_image_that_the_tokenizer_gives_back(
    architecture, row, start, started, images
):
    folder = start(architecture)
    vit = load_backbone(folder)
    name, changes = ROWS[row]
    _, method = started(folder, name, **changes)
    x = method.tokenizer.normalize(images)
    assert method.tokenizer.pixel_mean.tolist() == pytest.approx(STATISTICS["mean"])
    with torch.no_grad():
        seen = method.tokenizer.decode(method.tokenizer.encode(x))
        if row == "pixel tokenizer":
            torch.testing.assert_close(seen, x)
        z_t = method.encode(x) * method.gamma[10 if len(method.gamma) > 1 else 0]
        for t, label in ((0, 0), (len(method.sigma) - 1, 2)):
            labels = torch.full((len(x),), label) if method.denoiser.num_classes else None
            c = method.denoiser.condition(torch.full((len(x),), t), labels)
            tokens = method.denoiser.encode(method.network_input(z_t), c)
            assert error(tokens, tokens_of(vit, seen)) < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_export_of_a_start_is_the_start(architecture, start, started, images):
    """All of a patch is read with pixels as latents."""
    folder = start(architecture)
    vit = load_backbone(folder)
    _, method = started(folder, "dae")
    again = fold(method)
    x = method.tokenizer.normalize(images)
    assert error(tokens_of(again, x), tokens_of(vit, x)) < 1e-4
    for part in ("num_prefix_tokens", "num_reg_tokens", "has_class_token"):
        assert getattr(again, part) == getattr(vit, part)
    for name in ("norm_pre", "norm", "blocks.1.norm2", "blocks.1.mlp.fc1"):
        assert repr(again.get_submodule(name)) == repr(vit.get_submodule(name))
    with torch.no_grad():
        first, second = (model.forward_features(x)[:, 0] for model in (again, vit))
        assert error(first, second) < 1e-4  # the class token
        assert error(again(x), tokens_of(vit, x).mean(1)) < 1e-4


@pytest.mark.parametrize("architecture", ["mae", "dinov2", "clip"])
def test_positions_are_resized_as_timm_does(architecture, start, started, images):
    """But constants are those of the new grid."""
    folder = start(architecture, img_size=48)
    args = {"pretrained": True, "num_classes": 0, "img_size": 32}
    vit = timm.create_model(f"local-dir:{folder}", **args).eval()
    config, method = started(folder, "dae")
    constant = architecture == "mae"
    assert config.model.vit.pos_embed == ("sincos" if constant else "learn")
    assert any("pos_embed" in name for name in method.state_dict()) != constant
    if constant:
        with torch.no_grad():
            vit.pos_embed[0, 1:] = sincos_positions(32, 4)
    x = method.tokenizer.normalize(images)
    assert error(tokens_of(fold(method), x), tokens_of(vit, x)) < 1e-4


def test_other_pixel_statistics_are_taken_into_the_embedding(start, started, images):
    folder = start("dino")
    given = {"data__mean": (0.5, 0.5, 0.5), "data__std": (0.4, 0.3, 0.2)}
    _, method = started(folder, "dae", **given)
    assert method.tokenizer.pixel_std.tolist() == pytest.approx(given["data__std"])
    vit = load_backbone(folder)
    mean, std = (torch.tensor(STATISTICS[key])[:, None, None] for key in ("mean", "std"))
    own = tokens_of(vit, (images / 255 - mean) / std)
    assert error(tokens_of(fold(method), method.tokenizer.normalize(images)), own) < 1e-4


@pytest.fixture
def config(tiny):
    """config(spec): settings of a short run that name no size."""

    def make(spec, row="l_dae", **changes):
        short = {"optim__epochs": 0.25, "optim__warmup_epochs": 0.125} | changes
        return put(tiny(row, **short), UNNAMED_SIZES | {"init_from": str(spec)})

    return make


def test_a_run_needs_its_start_only_once(start, config, tmp_path, capsys):
    """To be opened, exported and resumed, config.yaml and checkpoints are enough."""
    folder, run = start("clip", reg_tokens=2, init_values=0.1), tmp_path / "run"
    vit = load_backbone(folder)
    pretrain(config(folder), run, "l_dae")
    assert "the tokenizer drops" in capsys.readouterr().out
    before = settings_of(run, "pretraining")
    assert before.model.name == ARCHITECTURES["clip"][0]
    assert before.data.mean == tuple(STATISTICS["mean"])
    folder.rename(tmp_path / "gone")
    trained, state = load_method(run)
    assert state["images_seen"] == 16
    opened = load_backbone(export(run, tmp_path / "exported"))
    assert opened.num_prefix_tokens == vit.num_prefix_tokens
    pretrain(config(folder), run, "l_dae")
    assert settings_of(run, "pretraining") == before
    again, _ = load_method(run)
    assert all(torch.equal(a, b) for a, b in zip(
        trained.state_dict().values(), again.state_dict().values(), strict=True
    ))  # fmt: skip
    starts = [
        open_start(config(spec), tmp_path / "new")[1] for spec in (run, tmp_path / "exported")
    ]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(tokens_of(starts[0], x), tokens_of(starts[1], x))
    for changes, sentence in (
        ({"model.depth": 3}, "model.depth is 3, but init_from .* has 2"),
        ({"init_from": "other"}, "init_from is '.*start' there, 'other' here"),
    ):
        with pytest.raises(InputError, match=sentence):
            pretrain(replace(config(folder), changes), run, "l_dae")


def test_a_timm_name_is_a_start(config, tmp_path, monkeypatch, awake):
    """Of weights that timm has, and of a checkpoint on this machine."""
    vit = awake(timm.create_model("test_vit", num_classes=0))
    torch.save(vit.state_dict(), tmp_path / "file.pth")
    settings = replace(config(f"test_vit@{tmp_path / 'file.pth'}"), {"data.img_size": 64})
    settled, opened = open_start(settings, tmp_path / "run")
    assert torch.equal(opened.blocks[0].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)
    sizes = {"name": "test_vit", "patch_size": 16, "embed_dim": 64, "depth": 6, "num_heads": 2}
    found = flatten(settled.model)
    assert sizes.items() <= found.items()
    assert found["vit.class_token"] and found["vit.final_norm"] and found["vit.act_layer"] == "gelu"


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model.embed_dim": 64}, "model.embed_dim is 64, but init_from .*start has 32"),
        ({"model.depth": 3}, "model.depth is 3, but init_from .*start has 2"),
        ({"model.patch_size": 4}, "model.patch_size is 4, but init_from .*start has 8"),
        ({"model.num_heads": 4}, "model.num_heads is 4, but init_from .*start has 2"),
        ({"model.name": "vit_tiny_patch16_224"}, "model.depth is 12, but init_from .*start has 2"),
        ({"model.vit.reg_tokens": 1}, "model.vit.reg_tokens is 1, but init_from .*start has 0"),
        ({"data.in_chans": 4}, "in_chans is for timm names"),
        ({"tokenizer.name": "conv_vae"}, "init_from needs a patch-wise tokenizer, not conv_vae"),
        ({"model.denoiser": "unet"}, "UNet is not a plain ViT, which init_from needs"),
        ({"init_from": "nothing"}, "there is no folder nothing and no timm model"),
        ({"init_from": "pixels"}, "init_from pixels is not a plain ViT: it is a Flatten"),
    ],
)
def test_what_does_not_fit_a_start_is_refused(changes, sentence, start, config, tmp_path):
    folder = start("dino")
    with pytest.raises(InputError, match=sentence) as refused:
        pretrain(replace(config(folder), changes), tmp_path / "run", "l_dae")
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_recipe_names_no_size_beside_a_start(tmp_path):
    for name in ("l_dae", "mae"):
        found = flatten(ldae.config(name, "demo", init_from="x"))
        known = UNNAMED_SIZES.items() & found.items()
        assert known and len(known) == sum(size in found for size in UNNAMED_SIZES)
        assert found["init_from"] == "x" and found["optim.batch_size"] == 128
    file = tmp_path / "mine.yaml"
    file.write_text("init_from: y\nmodel: {depth: 3}\n")
    found = flatten(recipes.read(file, "demo", init_from="x"))
    assert UNNAMED_SIZES.items() - found.items() == {("model.depth", None)}
    assert found["init_from"] == "y" and found["model.depth"] == 3


SWIN = {"img_size": 32, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
ONE = {"depth": 1, "embed_dim": 32, "num_heads": 2}


@pytest.mark.parametrize(
    "name, args, sentence",
    [
        ("swin_tiny_patch4_window7_224", SWIN, "it is a SwinTransformer"),
        ("test_convnext", {}, "it is a ConvNeXt"),
        ("vit_small_patch16_rope_224", ONE, "it is a Eva"),
        ("vit_small_resnet26d_224", ONE, "its patch_embed is a HybridEmbed"),
        ("vit_small_patch16_18x2_224", ONE, "its blocks.0 is a ParallelThingsBlock"),
        ("vit_giant_patch14_dinov2", ONE, "its blocks.0.mlp is a GluMlp"),
        ("test_vit", {"qk_norm": True}, "its blocks.0.attn.k_norm is LayerNorm.*does not have"),
        ("test_vit", {"qkv_bias": False}, "its blocks.0.attn.qkv is Linear.*, not Linear"),
        ("test_vit", {"act_layer": "relu"}, "its activation is ReLU, not gelu_tanh or gelu or qu"),
        ("test_vit", {"norm_layer": "rmsnorm"}, r"norm1 is RmsNorm\(.*, not LayerNorm"),
        ("test_vit", {"pos_embed": "none"}, "it has no table of positions"),
    ],
)
def test_what_is_no_plain_vit_is_refused(name, args, sentence, config, tmp_path, monkeypatch):
    vit = timm.create_model(name, num_classes=0, **args)
    monkeypatch.setattr("ldae.pretraining.start.load_backbone", lambda spec, **how: vit)
    with pytest.raises(InputError, match=f"^init_from {name} is not a plain ViT: .*{sentence}"):
        open_start(config(name), tmp_path / "run")
