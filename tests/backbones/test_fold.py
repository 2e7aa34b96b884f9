"""The fold, the export, and the start from an exported backbone."""

import json
import math

import pytest
import timm
import torch
from safetensors.torch import load_file

from ldae.backbones.fold import check_features, fold, init_from
from ldae.backbones.open import load_backbone
from ldae.backbones.run import backbone_of, load_method
from ldae.commands.export import export
from ldae.errors import InputError
from ldae.evals.features import Encoder, extract_share
from ldae.method import build
from ldae.models.contract import NoPlainViT
from ldae.models.dit import DiT
from ldae.tokenizers import TOKENIZERS, OrthonormalTokenizer

ROWS = range(6, 15)


def relative_error(actual, expected):
    return (actual - expected).norm() / expected.norm()


def assert_folded_equals_unfolded(unfolded, images):
    x = unfolded.tokenizer.normalize(images)
    t = 0 if len(unfolded.sigma) == 1 else 10
    with torch.no_grad():
        assert relative_error(fold(unfolded)(x), unfolded.features(x, t)) < 1e-5


@pytest.mark.parametrize("scale", ["raw", "per-axis"])
@pytest.mark.parametrize("row", ROWS)
def test_folded_equals_unfolded(row, scale, method, images):
    assert_folded_equals_unfolded(method(row, tokenizer__scale=scale), images)


@pytest.mark.parametrize("row", [8, 13])
def test_pixel_tokenizers_fold(row, method, images):
    unfolded = method(row, tokenizer__name="pixel", tokenizer__dim=12)
    assert_folded_equals_unfolded(unfolded, images)


@pytest.mark.parametrize("kind", ["patch_ae", "patch_vae"])
def test_trained_patch_tokenizers_fold_with_image_input(kind, method, images):
    assert_folded_equals_unfolded(method("image_input", tokenizer__name=kind), images)


@pytest.mark.parametrize("row", ["dit", "no_adversarial", "vqvae"])
def test_conv_tokenizers_are_graded_but_not_folded(row, method, images):
    trained = method(row, num_classes=10)
    with pytest.raises(InputError, match="conv_vae is a network, which cannot be folded"):
        fold(trained)
    x = trained.tokenizer.normalize(images)
    with torch.no_grad():
        features = backbone_of(trained)(x)
        torch.testing.assert_close(features, trained.features(x, 10))
        if row == "dit":
            trained.denoiser.y_embed.weight[:10].add_(1.0)
            assert torch.equal(backbone_of(trained)(x), features)


def test_backbone_ignores_what_the_tokenizer_drops(method, images):
    """In rows with image input, PCA has removed these directions from all training images."""
    trained = method("l_dae")
    x = trained.tokenizer.normalize(images)
    projected = trained.tokenizer.decode(trained.tokenizer.encode(x))
    backbone = fold(trained)
    with torch.no_grad():
        torch.testing.assert_close(backbone(projected), backbone(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(projected, x, atol=0.05)


def test_fold_depends_on_t(method, images):
    trained = method("l_dae")
    x = trained.tokenizer.normalize(images)
    with torch.no_grad():
        early, late = fold(trained, 10)(x), fold(trained, 900)(x)
        assert not torch.allclose(early, late, atol=1e-3)
        torch.testing.assert_close(late, trained.features(x, 900), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps, t", [(1000, 10), (500, 5), (4000, 40), (60, 1), (3, 0)])
def test_default_t_is_the_same_share_of_every_schedule(steps, t, method, images):
    trained = method(
        "linear_gamma2", num_classes=0, tokenizer__name="patch_pca", noise__steps=steps
    )
    x = trained.tokenizer.normalize(images)
    with torch.no_grad():
        assert relative_error(fold(trained)(x), trained.features(x, t)) < 1e-5
    trained = method("linear_gamma2", noise__steps=steps)  # a conv tokenizer, which is not folded
    with torch.no_grad():
        assert torch.equal(backbone_of(trained)(x), trained.features(x, t))


def test_features_of_a_class_conditional_row_do_not_depend_on_labels(method, images):
    """The null label is folded in."""
    trained = method("patch_pca", num_classes=10, model__class_conditional=True)
    x = trained.tokenizer.normalize(images)
    before = fold(trained)(x)
    with torch.no_grad():
        trained.denoiser.y_embed.weight[:10].add_(1.0)
    assert torch.equal(fold(trained)(x), before)


def test_wrong_fold_is_refused(method, monkeypatch):
    trained, original = method(), DiT.plain_state
    monkeypatch.setattr(DiT, "plain_state", lambda denoiser, c: {
        name: value * 1.001 if name.endswith("fc1.weight") else value
        for name, value in original(denoiser, c).items()
    })  # fmt: skip
    with pytest.raises(InputError, match="not exported: .* differs"):
        fold(trained)


@pytest.mark.parametrize("share", [2e-5, math.nan, math.inf])
def test_features_that_differ_or_are_not_finite_are_refused(share):
    own = torch.randn(4, 8)
    check_features(own * (1 + 5e-6), own)
    with pytest.raises(InputError, match="not exported: .* differs"):
        check_features(own * (1 + share), own)


def test_encoder_that_is_not_a_vit_is_graded_but_not_exported(
    run, tmp_path, images, pictures, monkeypatch
):
    def refuse(denoiser):
        raise NoPlainViT("a pyramid is no ViT")

    monkeypatch.setattr(DiT, "plain_vit", refuse)
    folder = run()
    trained, _ = load_method(folder)
    backbone, x = load_backbone(folder), trained.tokenizer.normalize(images)
    with torch.no_grad():
        assert torch.equal(backbone(x), trained.features(x, 10))
    assert extract_share(Encoder(backbone, torch.device("cpu")), pictures(5)).features.shape == (
        5,
        32,
    )
    for refused in (
        lambda: export(folder, tmp_path / "out"),
        lambda: load_backbone(folder, random_init=True),
    ):
        with pytest.raises(InputError, match="^a pyramid is no ViT"):
            refused()
    assert not list(tmp_path.glob("out*"))


def test_timm_opens_the_exported_folder(run, tmp_path, images):
    out = export(run(), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    trained, _ = load_method(tmp_path / "run-l_dae")
    x = trained.tokenizer.normalize(images)
    with torch.no_grad():
        assert relative_error(model(x), trained.features(x, 10)) < 1e-5
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 32, 32) and data["crop_pct"] == 1.0
    assert data["interpolation"] == "bicubic"
    mean = trained.tokenizer.pixel_mean.tolist()
    assert data["mean"] == pytest.approx(tuple(mean), abs=1e-5)
    written = json.loads((out / "config.json").read_text())
    assert written["architecture"] == "vit_tiny_patch16_224" and written["num_classes"] == 0
    cfg = written["pretrained_cfg"]
    assert cfg["tag"] == "ldae" and "hf_hub_id" not in cfg and "license" not in cfg
    names = load_file(out / "model.safetensors")
    assert not [name for name in names if name.startswith(("encoder", "mask_token"))]


@pytest.mark.parametrize(
    "arguments, shape",
    [
        ({"img_size": 64}, (2, 3, 64, 64)),
        ({"dynamic_img_size": True}, (2, 3, 48, 40)),
        ({"in_chans": 1}, (2, 1, 32, 32)),
        ({"num_classes": 5}, (2, 3, 32, 32)),
        ({"features_only": True, "out_indices": (0, 1)}, (2, 3, 32, 32)),
    ],
)
def test_timm_opens_the_exported_folder_with_other_arguments(arguments, shape, run, tmp_path):
    out = export(run(), tmp_path / "out")
    model = timm.create_model(f"local-dir:{out}", pretrained=True, **arguments).eval()
    with torch.no_grad():
        result = model(torch.randn(shape))
    for part in result if isinstance(result, list) else [result]:
        assert part.isfinite().all() and len(part) == 2
    if "num_classes" in arguments:
        assert result.shape == (2, 5)


def test_export_refuses_other_folders_and_missing_checkpoints(run, tmp_path):
    folder = run()
    existing = tmp_path / "there"
    existing.mkdir()
    with pytest.raises(InputError, match="there exists already"):
        export(folder, existing)
    export(folder, tmp_path / "twice")
    before = (tmp_path / "twice" / "config.json").stat()
    assert export(folder, tmp_path / "twice") == tmp_path / "twice"
    assert (tmp_path / "twice" / "config.json").stat() == before
    with pytest.raises(InputError, match="twice exists already"):
        export(folder, tmp_path / "twice", timestep=500)
    with pytest.raises(InputError, match="there is no folder .*nowhere"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InputError, match="timestep 1000 is not in 0 .. 999"):
        export(folder, tmp_path / "out", timestep=1000)
    with pytest.raises(InputError, match="timestep -1 is not in 0 .. 999"):
        export(folder, tmp_path / "out", timestep=-1)
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="has no checkpoint yet"):
        export(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def start(method, tiny):
    """start(trained, row): a new run of the row, with the tokenizer of the trained one, that begins
    with its exported backbone."""

    def make(trained, row, **changes):
        started = build(tiny(row, **changes)).eval()
        started.tokenizer.load_state_dict(trained.tokenizer.state_dict())
        init_from(started, fold(trained))
        return started

    return make


@pytest.mark.parametrize(
    "row, kind",
    [
        (row, kind)
        for row in (*ROWS, "dae")
        for kind in ("patch_pca", "pixel", "patch_ae", "patch_vae")
        if row not in (13, 14, "dae") or issubclass(TOKENIZERS[kind], OrthonormalTokenizer)
    ],
)
def test_fold_of_a_started_run_is_the_backbone_it_started_from(row, kind, method, start, images):
    """This holds for every patch-wise row, with each tokenizer that the row takes."""
    trained = method(row, tokenizer__name=kind)
    exported, again = fold(trained), fold(start(trained, row, tokenizer__name=kind))
    x = trained.tokenizer.normalize(images)
    with torch.no_grad():
        assert relative_error(again(x), exported(x)) < 1e-5
    for name, value in exported.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", ["l_dae", "predict_latent"])
def test_run_starts_with_the_features_of_the_backbone_at_every_t(row, method, start, images):
    """A row that scales its input sees gamma_t z_0."""
    trained = method("l_dae")
    exported, started = fold(trained), start(trained, row)
    x, t = trained.tokenizer.normalize(images), 700
    z_0 = started.encode(x)
    scale = started.gamma[t] / started.gamma[10]
    with torch.no_grad():
        expected = exported(trained.tokenizer.decode(scale * z_0))
        torch.testing.assert_close(started.features(x, t), expected, rtol=1e-4, atol=1e-4)


def test_a_start_says_which_share_of_it_the_tokenizer_drops(method, tiny, fitted, images):
    exported = fold(method("l_dae"))  # it reads six principal axes
    shares = []
    for dim in (9, 6, 5, 1):
        started = build(tiny("patch_pca", tokenizer__dim=dim)).eval()
        fitted(started.tokenizer)
        shares.append(init_from(started, exported))
        x = started.tokenizer.normalize(images)
        with torch.no_grad():
            error = relative_error(fold(started)(x), exported(x))
        assert (error < 1e-5) == (dim >= 6)
    assert max(shares[:2]) < 1e-6 and 0.01 < shares[2] < shares[3] < 1
