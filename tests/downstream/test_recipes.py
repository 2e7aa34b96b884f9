"""The recipes of fine-tuning and of detection: each is whole, and is found for a backbone."""

from types import SimpleNamespace

import pytest

from ldae import tree
from ldae.detection.recipes import RECIPES as DETECTION
from ldae.detection.recipes import detect_config
from ldae.downstream.recipes import default_size
from ldae.errors import InputError
from ldae.finetuning.recipes import RECIPES as FINE_TUNING
from ldae.finetuning.recipes import finetune_config
from ldae.runs.kinds import KINDS, to_yaml

BOTH = [FINE_TUNING, DETECTION]
SIZES = [
    (recipes, name, size) for recipes in BOTH for name in recipes for size in recipes[name].sizes
]


@pytest.mark.parametrize("recipes, name, size", SIZES)
def test_recipes_state_every_constant(recipes, name, size):
    """Otherwise a change of a default would change a recipe without a new version."""
    stated, config = recipes[name], recipes.config(name, size)
    constants = {
        key
        for key in tree.flatten(config)
        if key.startswith(("augment.", "model.", "optim.")) and key != "model.random_init"
    }
    assert constants == {*stated.constants, *stated.sizes[size]} - {"data.img_size"}
    tree.check(config)


@pytest.mark.parametrize("recipes", BOTH)
def test_the_defaults_are_a_recipe_for_vit_b(recipes):
    defaults = KINDS[recipes.kind].defaults()
    assert recipes.config(defaults.recipe) == defaults


@pytest.mark.parametrize("recipes", BOTH)
@pytest.mark.parametrize("size", ["B", "L", "H"])
def test_changed_constants_are_listed(recipes, size):
    config = recipes.config(next(iter(recipes)), size)
    changes = {"optim.epochs": 7, "system.workers": 0, "data.source": "digits", "seed": 3}
    used = tree.replace(config, changes)
    assert recipes.changed_constants(used) == {"optim.epochs": (config.optim.epochs, 7.0)}


@pytest.mark.parametrize("make, name", [(finetune_config, "mae"), (detect_config, "vitdet")])
def test_the_size_comes_from_the_width(make, name, monkeypatch):
    wide = SimpleNamespace(num_features=1024)
    monkeypatch.setattr("ldae.downstream.recipes.load_backbone", lambda *_, **__: wide)
    config = make("wide", name, {"optim.epochs": 3.0})
    assert (config.backbone, config.size, config.recipe) == ("wide", "L", name)
    assert config.optim.epochs == 3.0 and make("wide", name, size="H").size == "H"


@pytest.mark.parametrize(
    "make, recipes, name",
    [(finetune_config, FINE_TUNING, "mae"), (detect_config, DETECTION, "vitdet")],
)
def test_a_run_keeps_the_version_that_it_began_with(make, recipes, name, monkeypatch, tmp_path):
    newer = recipes[name]._replace(version=3, former={1: {"optim.min_lr": 1e-5}})
    monkeypatch.setitem(recipes, name, newer)
    begun = recipes.config(name, "B", version=1)
    (tmp_path / "config.yaml").write_text(to_yaml(begun, recipes.kind))
    for run, version in ((tmp_path, 1), (tmp_path / "new", 3), (None, 3)):
        config = make("x", name, size="B", run=run)
        assert config.version == version and (config.optim.min_lr == 1e-5) == (version == 1)
        assert recipes.changed_constants(config) == {}


def test_the_default_size_is_at_least_as_wide_as_the_backbone(monkeypatch):
    assert default_size("test_vit") == "B"
    assert default_size("pixels:8") == "B"
    for width, size in ((384, "B"), (768, "B"), (769, "L"), (1024, "L"), (1280, "H"), (2048, "H")):
        network = SimpleNamespace(num_features=width)
        monkeypatch.setattr(
            "ldae.downstream.recipes.load_backbone", lambda spec, random_init: network
        )
        assert default_size("any") == size


def test_unknown_names_are_refused_with_the_nearest_name():
    for call, sentence in (
        (lambda: FINE_TUNING.config("l-dae"), "no recipe 'l-dae'; the nearest is 'ldae'"),
        (lambda: detect_config("no such", "vitdett"), "the nearest is 'vitdet'"),
        (lambda: FINE_TUNING.config("mae", "XL"), "there is no size 'XL'; there are B, L, H"),
    ):
        with pytest.raises(InputError, match=sentence):
            call()
