"""The head of a whitened export is the whitening, which belongs to the backbone alone."""

import json

import numpy as np
import pytest
import timm
import torch

from ldae.backbones.fold import init_from
from ldae.backbones.open import load_backbone, load_classifier
from ldae.backbones.preprocessing import preprocessing
from ldae.backbones.run import load_method
from ldae.backbones.timm_folder import write_timm_folder
from ldae.commands.export import export
from ldae.commands.finetune import finetune
from ldae.commands.knn import knn
from ldae.commands.linear import CachedProtocol, linear
from ldae.commands.validate import validate
from ldae.data.open import open_source
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.features import Encoder, encode_share
from ldae.evals.neighbours import KNNProtocol
from ldae.finetuning.network import build_network
from ldae.finetuning.settings import FinetuneConfig
from ldae.method import build
from ldae.pretraining.start import open_start

DATA = "scattered-digits:64"
CPU = torch.device("cpu")
HOW = {"whiten": DATA, "whiten_shrinkage": 0.01, "workers": 0, "device": "cpu"}


@pytest.fixture
def exports(run, tmp_path):
    """The folders of a run, of its export, and of its whitened export."""
    folder = run()
    return folder, export(folder, tmp_path / "plain"), export(folder, tmp_path / "white", **HOW)


def features(folder) -> torch.Tensor:
    encoder = Encoder(load_backbone(folder), CPU, batch_size=16)
    return encode_share(encoder, open_source(DATA, "train"))


def test_the_head_is_the_whitening(exports, images):
    _, plain, white = exports
    rows = features(plain).double().numpy()
    covariance = np.cov(rows.T, bias=True)
    shrunk = 0.99 * covariance + 0.01 * np.trace(covariance) / 32 * np.eye(32)
    values, vectors = np.linalg.eigh(shrunk)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    opened = timm.create_model(f"local-dir:{white}", pretrained=True).eval()
    np.testing.assert_allclose(opened.head.weight.detach(), root, rtol=1e-3, atol=1e-3)
    wanted = (rows - rows.mean(0)) @ root
    np.testing.assert_allclose(features(white), wanted, atol=1e-3)
    x = images.float() / 255
    with torch.no_grad():
        assert torch.equal(load_backbone(white)(x), opened(x))
        body = timm.create_model(f"local-dir:{white}", pretrained=True, num_classes=0).eval()
        assert torch.equal(body(x), load_backbone(plain)(x))


def test_config_and_model_card_say_how_features_are_whitened(exports):
    _, plain, white = exports
    config = json.loads((white / "config.json").read_text())
    source = {
        "data": DATA,
        "split": "train",
        "fingerprint": open_source(DATA, "train").fingerprint(),
    }
    assert config["whitening"] == source | {"images": 64, "shrinkage": 0.01}
    assert config["num_classes"] == 32
    assert "64 images of scattered-digits:64 (train)" in (white / "README.md").read_text()
    assert "whitening" not in json.loads((plain / "config.json").read_text())
    assert "whiten" not in (plain / "README.md").read_text()


def test_knn_of_the_export_is_knn_of_the_run_with_whitening(exports, tmp_path):
    folder, _, white = exports

    def graded(spec, **given) -> dict:
        protocol = KNNProtocol(k=(1, 5), **given)
        return knn(str(spec), DATA, protocol=protocol, setup=Setup(workers=0, device="cpu"))

    asked = graded(folder, whiten=True, whiten_shrinkage=0.01)
    assert graded(white)["results"] == asked["results"] != graded(folder)["results"]


def test_the_untrained_control_is_not_whitened(exports, images):
    _, plain, white = exports
    x = images.float() / 255
    control, expected = (load_backbone(folder, random_init=True) for folder in (white, plain))
    with torch.no_grad():
        assert torch.equal(control(x), expected(x))


def test_the_hub_gives_the_whitening_too(exports, images, monkeypatch):
    _, plain, white = exports
    x = images.float() / 255
    for folder in (plain, white):
        monkeypatch.setattr(
            "timm.models._hub.hf_hub_download",
            lambda repo_id, filename, **how: str(folder / filename),
        )
        with torch.no_grad():
            assert torch.equal(load_backbone("hf-hub:user/model")(x), load_backbone(folder)(x))


def test_the_hub_gives_channels_and_architecture_too(run, tmp_path, monkeypatch):
    model = load_backbone("test_vit", random_init=True, in_chans=4, img_size=32)
    write_timm_folder(tmp_path / "four", model, model.model_args)
    ours = export(run(), tmp_path / "ours")
    for folder, chans in ((tmp_path / "four", 4), (ours, 3)):
        monkeypatch.setattr(
            "timm.models._hub.hf_hub_download",
            lambda repo_id, filename, **how: str(folder / filename),
        )
        x = torch.randn(2, chans, 32, 32)
        for random_init in (False, True):
            opened, own = (
                load_backbone(spec, random_init=random_init)
                for spec in ("hf-hub:user/model", folder)
            )
            with torch.no_grad():
                assert torch.equal(opened(x), own(x))
            assert preprocessing(opened) == preprocessing(own)
        config = FinetuneConfig(backbone="hf-hub:user/model")
        network = build_network(load_backbone(config.backbone), config, 4).eval()
        assert network(x).shape == (2, 4)
        again = export(config.backbone, tmp_path / f"again-{chans}")
        with torch.no_grad():
            assert torch.equal(load_backbone(again)(x), load_backbone(folder)(x))
    assert load_backbone("hf-hub:user/model", in_chans=5)(torch.zeros(1, 5, 32, 32)).ndim == 2


def test_the_same_export_again_is_no_error(exports, run, tmp_path, capsys):
    folder, plain, white = exports
    assert export(folder, white, **HOW) == white
    assert "is this export already" in capsys.readouterr().out
    for other in ({}, HOW | {"whiten_shrinkage": 0.02}, HOW | {"whiten": "scattered-digits:48"}):
        with pytest.raises(InputError, match="white exists already"):
            export(folder, white, **other)
    with pytest.raises(InputError, match="plain exists already"):
        export(folder, plain, **HOW)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("pretrained_cfg", "mean", [0.1, 0.2, 0.3]),
        ("pretrained_cfg", "interpolation", "bilinear"),
        ("pretrained_cfg", "crop_pct", 0.9),
        ("model_args", "num_heads", 4),
        (None, "architecture", "vit_small_patch16_224"),
    ],
)
def test_an_export_with_the_same_weights_but_another_configuration_stays(part, key, value, exports):
    folder, plain, _ = exports
    config = json.loads((plain / "config.json").read_text())
    (config[part] if part else config)[key] = value
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="plain exists already"):
        export(folder, plain)


def test_wrong_settings_are_refused(run, tmp_path):
    folder = run()
    for how, message in (
        ({"whiten_shrinkage": 0.5}, "--whiten-shrinkage needs --whiten"),
        (HOW | {"whiten_shrinkage": -1.0}, "whiten_shrinkage must be at least 0"),
        (HOW | {"whiten": "scattered-digits:20", "whiten_shrinkage": 0.0}, "vary in 19 of 32"),
        (HOW | {"whiten": "nowhere"}, "no folder, archive or built-in data set"),
    ):
        with pytest.raises(InputError, match=message):
            export(folder, tmp_path / "out", **how)
    assert not list(tmp_path.glob("out*"))


def test_a_whitening_is_no_classifier(exports):
    _, _, white = exports
    for refused in (
        lambda: validate(str(white), DATA, setup=Setup(workers=0, device="cpu")),
        lambda: load_classifier(white),
    ):
        with pytest.raises(InputError, match="white has no classifier: its head whitens"):
            refused()


def test_a_pre_training_starts_from_the_body(exports, tiny):
    folder, plain, white = exports
    states = []
    for exported in (plain, white):
        torch.manual_seed(0)
        method = build(tiny()).eval()
        method.tokenizer.load_state_dict(load_method(folder)[0].tokenizer.state_dict())
        _, start = open_start(tiny(init_from=str(exported)), exported / "new")
        init_from(method, start)
        states.append(method.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_fine_tuning_starts_from_the_body(exports, short_tuning, tmp_path):
    _, plain, white = exports
    weights = []
    for exported in (plain, white):
        finetune(short_tuning(exported, DATA), tmp_path / f"tuned-{exported.name}")
        weights.append(load_classifier(tmp_path / f"tuned-{exported.name}").state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_saved_probe_holds_the_whitening(exports, tmp_path):
    """The command compares the logits of the saved classifier with those of the probe."""
    _, _, white = exports
    setup = Setup(workers=0, device="cpu")
    protocol = CachedProtocol(epochs=2, learning_rates=(0.1,))
    linear(str(white), DATA, protocol=protocol, save=tmp_path / "probe", setup=setup)
    assert load_classifier(tmp_path / "probe").num_classes == 10


def test_any_timm_model_is_exported(tmp_path):
    """By name, by a file, and as the folder of an export, with its classifier or without."""
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=6).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    spec = f"test_resnet@{tmp_path / 'weights.pth'}"
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        logits = model(images)
        model.reset_classifier(0)
        features = model(images)

        def computed(spec, name: str, **how) -> torch.Tensor:
            folder = export(spec, tmp_path / name, **how)
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)

        assert torch.equal(computed(spec, "body"), features)
        assert torch.equal(computed(spec, "whole", classifier=True), logits)
        assert torch.equal(computed(tmp_path / "whole", "again"), logits)
        assert torch.equal(computed(tmp_path / "whole", "cut", classifier=False), features)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "image classifier" in card and "test_resnet" in card and str(tmp_path) not in card


def test_a_probe_is_exported_with_its_classes(run, tmp_path):
    probe, out = tmp_path / "probe", tmp_path / "out"
    setup = Setup(workers=0, device="cpu", out=tmp_path / "graded")
    linear(run(), DATA, protocol=CachedProtocol(epochs=1), save=probe, setup=setup)
    export(probe, out, license="mit")
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (probe, out))
    assert one["label_names"] == other["label_names"] and one["num_classes"] == 10
    assert other["pretrained_cfg"]["license"] == "mit"
    assert "license: mit" in (out / "README.md").read_text()


def test_an_export_of_an_export_keeps_card_license_and_whitening(exports, run, tmp_path):
    _, _, white = exports
    out = export(white, tmp_path / "again")
    for name in ("README.md", "model.safetensors"):
        assert (out / name).read_bytes() == (white / name).read_bytes()
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (white, out))
    assert one["whitening"] == other["whitening"] and one["images_seen"] == other["images_seen"]
    with pytest.raises(InputError, match="--whiten needs a ViT without a head"):
        export(white, tmp_path / "twice", **HOW)
    licensed = export(white, tmp_path / "licensed", license="mit")
    card = (licensed / "README.md").read_text()
    assert "license: mit" in card and "| license of the weights | mit |" in card


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("ldae.commands.export.open_network", None)  # the work
    with pytest.raises(InputError, match="file/deep cannot be written: .*file is not a writable"):
        export("runs/l_dae", tmp_path / "file" / "deep" / "out")


def test_the_card_names_data_recipe_and_license(run, tmp_path):
    card = (export(run(optim__epochs=3), tmp_path / "out", license="mit") / "README.md").read_text()
    assert "| pre-trained on | 64 images of scattered-digits:64, 8 seen |" in card
    assert "| recipe | 3 epochs, batch 8, blr 0.01 " in card
    assert "| license of the weights | mit |" in card
