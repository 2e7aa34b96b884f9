from types import SimpleNamespace

import pytest

from ldae import tree
from ldae.detection import recipes
from ldae.detection.settings import DetectConfig
from ldae.errors import InputError
from ldae.train.optim import peak_lr

# The published constants of ViTDet, written a second time by hand: epochs, layer decay, drop path.
PUBLISHED = {"B": (100, 0.7, 0.1), "L": (100, 0.8, 0.4), "H": (75, 0.9, 0.5)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_vitdet_has_the_published_constants(size):
    config = recipes.config("vitdet", size)
    model, optim = config.model, config.optim
    assert (optim.epochs, model.layer_decay, model.drop_path) == PUBLISHED[size]
    assert peak_lr(optim) == pytest.approx(1e-4) and optim.weight_decay == 0.1
    assert (optim.batch_size, optim.betas) == (64, (0.9, 0.999))
    assert config.augment.scale == (0.1, 2.0) and config.augment.flip == 0.5
    assert (model.dim, model.rpn_convs, model.box_convs, model.box_dim) == (256, 2, 4, 1024)


def test_the_defaults_are_vitdet_for_vit_b():
    assert recipes.config() == DetectConfig()


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("size", PUBLISHED)
def test_recipes_state_every_constant(name, size):
    """Otherwise a change of a default would change a recipe without a new version."""
    stated = recipes.RECIPES[name]
    constants = {
        key
        for key in tree.flatten(DetectConfig())
        if key.startswith(("augment.", "model.", "optim.")) and key != "model.random_init"
    }
    assert constants == {*stated.constants, *stated.sizes[size]} - {"data.img_size"}
    tree.check(recipes.config(name, size))


def test_the_size_comes_from_the_width(monkeypatch):
    wide = SimpleNamespace(num_features=1024)
    monkeypatch.setattr("ldae.finetuning.recipes.load_backbone", lambda *_, **__: wide)
    config = recipes.detect_config("wide", changes={"optim.epochs": 3.0})
    assert (config.backbone, config.size, config.recipe) == ("wide", "L", "vitdet")
    assert recipes.changed_constants(config) == {"optim.epochs": (100.0, 3.0)}


def test_wrong_names_are_refused():
    for call, sentence in (
        (lambda: recipes.detect_config("x", "vitdett"), "the nearest is 'vitdet'"),
        (lambda: recipes.config("vitdet", "XL"), "there is no size 'XL'; there are B, L, H"),
    ):
        with pytest.raises(InputError, match=sentence):
            call()
