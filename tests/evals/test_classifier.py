"""A saved classifier has the same logits in timm as the probe."""

import pytest
import timm
import torch
import torch.nn.functional as F

from ldae.backbones.open import load_backbone
from ldae.commands.linear import CachedProtocol
from ldae.errors import InputError
from ldae.evals.accuracy import label_ranks
from ldae.evals.classifier import fold_batchnorm, save_classifier
from ldae.evals.features import Encoder, extract_share
from ldae.evals.heads import Head, grade_heads, train_heads
from ldae.evals.taps import Tap

CPU = torch.device("cpu")
SHORT = CachedProtocol(epochs=3, total_batch=32)


def train(features, classes, rate=0.1):
    return train_heads(features, [Head(Tap(), rate)], classes, SHORT, CPU)[Tap()]


def test_folded_head_equals_the_unfolded_one(cloud):
    heads, queries = train(cloud(300, 0), 4, 0.5), cloud(50, 1).features
    folded = fold_batchnorm(heads.norm, heads.weight[0], heads.bias[0])
    assert torch.allclose(F.linear(queries, *folded), heads(queries)[:, 0], atol=1e-4)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_saved_classifier_has_the_probes_logits_in_timm(name, pictures, tmp_path):
    backbone = load_backbone(name, random_init=True, img_size=16)
    images, evaluation = pictures(200), pictures(61, "eval", seed=1)
    fits = [extract_share(Encoder(backbone, CPU), source) for source in (images, evaluation)]
    heads = train(fits[0], 3)
    save_classifier(backbone, heads, images.classes, tmp_path / "out", evaluation)
    opened = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    logits = extract_share(Encoder(opened, CPU), evaluation).features
    assert torch.allclose(logits, heads(fits[1].features)[:, 0], atol=1e-3)
    graded = grade_heads({Tap(): heads}, fits[1], CPU)[Tap()]
    assert 100 * (label_ranks(logits, fits[1].labels) == 0).double().mean() == pytest.approx(
        graded[0, 0].item()
    )
    assert opened.pretrained_cfg["label_names"] == images.classes
    assert opened.pretrained_cfg["tag"] == "linear"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    again = load_backbone(tmp_path / "out")
    assert torch.equal(extract_share(Encoder(again, CPU), evaluation).features, fits[1].features)


def test_classifier_with_other_logits_is_not_saved(pictures, tmp_path, monkeypatch):
    backbone = load_backbone("test_vit", random_init=True, img_size=16)
    source = pictures(64)
    heads = train(extract_share(Encoder(backbone, CPU), source), 3)
    monkeypatch.setattr("ldae.evals.classifier.fold_batchnorm", lambda norm, *unfolded: unfolded)
    with pytest.raises(InputError, match="not saved"):
        save_classifier(backbone, heads, None, tmp_path / "out", source)
    assert not (tmp_path / "out").exists()
