import pytest

from ldae import tree
from ldae.finetuning import recipes
from ldae.train.optim import peak_lr

# The published constants, written a second time by hand.
COMMON = {
    "optim.batch_size": 1024, "optim.weight_decay": 0.05, "optim.warmup_epochs": 5,
    "optim.min_lr": 1e-6, "optim.betas": (0.9, 0.999), "optim.clip_grad": 0,
    "augment.label_smoothing": 0.1, "augment.policy": "rand-m9-mstd0.5-inc1",
    "augment.erasing": 0.25, "augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.mix_prob": 1.0,
    "augment.switch_prob": 0.5, "augment.min_area": 0.08, "augment.flip": 0.5,
    "model.pool": "fc_norm", "model.head_std": 2e-5, "model.random_init": False,
}  # fmt: skip
PER_SIZE = {  # epochs, blr, layer decay, drop path, moving average
    ("mae", "B"): (100, 5e-4, 0.65, 0.1, 0),
    ("mae", "L"): (50, 1e-3, 0.75, 0.2, 0),
    ("mae", "H"): (50, 1e-3, 0.75, 0.3, 0),
    ("ldae", "B"): (100, 1e-3, 0.85, 0.1, 0.9999),
    ("ldae", "L"): (100, 1e-3, 0.65, 0.1, 0.9999),
    ("ldae", "H"): (100, 1e-3, 0.65, 0.1, 0.9999),
}


@pytest.mark.parametrize("name, size", PER_SIZE)
def test_recipes_have_the_published_constants(name, size):
    epochs, blr, layer_decay, drop_path, ema = PER_SIZE[name, size]
    expected = COMMON | {
        "optim.epochs": epochs, "optim.blr": blr, "optim.ema": ema,
        "model.layer_decay": layer_decay, "model.drop_path": drop_path,
        "recipe": name, "size": size, "version": 2, "optim.ema_warmup": name == "ldae",
        "augment.mix_images": 16 if (name, size) == ("mae", "H") else 32,
    }  # fmt: skip
    actual = tree.flatten(recipes.RECIPES.config(name, size))
    assert {key: actual[key] for key in expected} == expected


def test_peak_learning_rate_matches_the_paper():
    assert peak_lr(recipes.RECIPES.config("ldae").optim) == pytest.approx(4e-3)


@pytest.mark.parametrize("name, size", PER_SIZE)
def test_former_versions_keep_their_constants(name, size):
    """Version 1 of the recipe ldae averaged the weights with one decay from the first step on.

    That of MAE's recipe for H mixed twice as many images.
    """
    former, newest = (
        recipes.RECIPES.config(name, size, version=1),
        recipes.RECIPES.config(name, size),
    )
    changed = {"optim.ema_warmup": (False, True)} if name == "ldae" else {}
    if (name, size) == ("mae", "H"):
        changed = {"augment.mix_images": (32, 16)}
    assert tree.difference(former, newest) == {"version": (1, 2)} | changed
    assert recipes.RECIPES.changed_constants(former) == {}
