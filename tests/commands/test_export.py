"""The head of a whitened export is the whitening, which belongs to the backbone alone."""

import json

import numpy as np
import pytest
import timm
import torch

from ldae.backbones.fold import init_from
from ldae.backbones.open import load_backbone, load_classifier
from ldae.backbones.run import load_run
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
from ldae.finetuning import recipes
from ldae.method import build
from ldae.pretraining.start import open_start
from ldae.tree import replace

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


def test_the_same_export_again_is_no_error(exports, run, tmp_path, capsys):
    folder, plain, white = exports
    assert export(folder, white, **HOW) == white
    assert "is this export already" in capsys.readouterr().out
    for other in ({}, HOW | {"whiten_shrinkage": 0.02}, HOW | {"whiten": "scattered-digits:48"}):
        with pytest.raises(InputError, match="white exists already"):
            export(folder, white, **other)
    with pytest.raises(InputError, match="plain exists already"):
        export(folder, plain, **HOW)


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
        method.tokenizer.load_state_dict(load_run(folder)[0].tokenizer.state_dict())
        _, start = open_start(tiny(init_from=str(exported)), exported / "new")
        init_from(method, start)
        states.append(method.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_fine_tuning_starts_from_the_body(exports, tmp_path):
    _, plain, white = exports
    weights = []
    for exported in (plain, white):
        config = replace(recipes.config(), {
            "backbone": str(exported), "data.source": DATA, "augment.mix_images": 4,
            "optim.batch_size": 16, "optim.epochs": 1, "optim.warmup_epochs": 0.2,
            "system.workers": 0, "system.device": "cpu", "system.precision": "fp32",
        })  # fmt: skip
        finetune(config, tmp_path / f"tuned-{exported.name}")
        weights.append(load_classifier(tmp_path / f"tuned-{exported.name}").state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_saved_probe_holds_the_whitening(exports, tmp_path):
    """The command compares the logits of the saved classifier with those of the probe."""
    _, _, white = exports
    setup = Setup(workers=0, device="cpu")
    protocol = CachedProtocol(epochs=2, learning_rates=(0.1,))
    linear(str(white), DATA, protocol=protocol, save=tmp_path / "probe", setup=setup)
    assert load_classifier(tmp_path / "probe").num_classes == 10
