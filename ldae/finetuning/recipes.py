"""The recipes of fine-tuning, by name and version, and their constants for each size of ViT."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldae.backbones.open import load_backbone
from ldae.errors import InputError, unknown
from ldae.finetuning.settings import FinetuneConfig
from ldae.runs.kinds import kind_of, settings_of
from ldae.tree import difference, replace

WIDTHS = {"B": 768, "L": 1024, "H": 1280}
"""Embedding widths of the ViTs for which recipes are published."""

DEFAULT = ""  # there is none: users name the recipe


class Recipe(NamedTuple):
    """All constants of a recipe: ``constants`` for all sizes, ``sizes`` for each size.

    ``former`` holds the constants that former versions had instead, by version.
    """

    version: int
    constants: dict[str, Any]
    sizes: dict[str, dict[str, Any]]
    former: dict[int, dict[str, Any]] = {}


# MAE (He et al. 2022), main_finetune.py and FINETUNE.md. H differs from L only in its drop path
# rate.
_MAE = {
    "augment.min_area": 0.08, "augment.flip": 0.5, "augment.policy": "rand-m9-mstd0.5-inc1",
    "augment.erasing": 0.25, "augment.mixup": 0.8, "augment.cutmix": 1.0,
    "augment.mix_prob": 1.0, "augment.switch_prob": 0.5, "augment.mix_images": 32,
    "augment.label_smoothing": 0.1,
    "model.pool": "fc_norm", "model.head_std": 2e-5,
    "optim.batch_size": 1024, "optim.weight_decay": 0.05, "optim.betas": (0.9, 0.999),
    "optim.warmup_epochs": 5.0, "optim.min_lr": 1e-6, "optim.clip_grad": 0.0, "optim.ema": 0.0,
    "optim.ema_warmup": False,
}  # fmt: skip

_LARGE = {"optim.epochs": 50.0, "optim.blr": 1e-3, "model.layer_decay": 0.75}

# The l-DAE paper (Chen et al. 2024), table in the appendix. Constants that it does not state are
# MAE's, since it says that its linear probe follows MAE. 4e-3 at batch 1024 is a blr of 1e-3. The
# paper has no H; H gets the constants of L. Without the warm-up, the average of version 1 still had
# 61 % of the initial weights after 100 epochs on CIFAR-10, and 91 % on Imagenette.
_LDAE = _MAE | {
    "optim.blr": 1e-3, "optim.epochs": 100.0, "optim.ema": 0.9999, "optim.ema_warmup": True,
    "model.drop_path": 0.1,
}  # fmt: skip

RECIPES = {
    "mae": Recipe(1, _MAE, {
        "B": {"optim.epochs": 100.0, "optim.blr": 5e-4, "model.layer_decay": 0.65,
              "model.drop_path": 0.1},
        "L": _LARGE | {"model.drop_path": 0.2},
        "H": _LARGE | {"model.drop_path": 0.3},
    }),
    "ldae": Recipe(2, _LDAE, {
        "B": {"model.layer_decay": 0.85},
        "L": {"model.layer_decay": 0.65},
        "H": {"model.layer_decay": 0.65},
    }, former={1: {"optim.ema_warmup": False}}),
}  # fmt: skip


def find_recipe(name: str) -> Recipe:
    """Return the recipe of this name.

    Raises: InputError with the nearest name when there is none.
    """
    if name not in RECIPES:
        raise unknown("there is no recipe", name, RECIPES, f", and there are {', '.join(RECIPES)}")
    return RECIPES[name]


def config(name: str = "mae", size: str = "B", version: int | None = None) -> FinetuneConfig:
    """Return the settings of a recipe for a size of ViT: B, L or H.

    ``version`` is by default the newest.

    Raises: InputError when there is no such recipe or size.
    """
    chosen = find_recipe(name)
    if size not in chosen.sizes:
        raise InputError(f"there is no size {size!r}; there are {', '.join(chosen.sizes)}")
    version = version or chosen.version
    changes = {"recipe": name, "version": version, "size": size}
    changes |= chosen.constants | chosen.sizes[size] | chosen.former.get(version, {})
    return replace(FinetuneConfig(), changes)


def finetune_config(
    backbone: str | Path,
    recipe: str = "mae",
    changes: Mapping[str, Any] | None = None,
    *,
    size: str = "",
    run: str | Path | None = None,
) -> FinetuneConfig:
    """Return the settings of a fine-tuning: a backbone by a recipe.

    Args:
        backbone: a run folder, an exported folder, a timm name or NAME@FILE.
        recipe: mae or ldae.
        changes: dotted name of a setting -> value, such as ``data.source``.
        size: B, L or H, which the constants are for; by default from the backbone's width.
        run: a run folder: a fine-tuning that it holds keeps the version of the recipe that it began
            with.

    Raises: InputError for a recipe, size or setting that does not exist, and for a backbone that
        cannot be opened.

    Examples:
        >>> changes = {"data.source": "/data/imagenet", "optim.epochs": 50}
        >>> config = ldae.finetune_config("runs/l_dae", "ldae", changes)
        >>> ldae.finetune(config, "runs/finetuned")["results"]["top1"]
    """
    find_recipe(recipe)  # refuse a wrong name before the backbone is opened
    size = size or default_size(str(backbone))
    version = version_of(Path(run), recipe) if run else None
    named = {"backbone": str(backbone)} | dict(changes or {})
    return replace(config(recipe, size, version), named)


def version_of(run: Path, name: str) -> int | None:
    """Return the version of the recipe that the fine-tuning in a run folder began with, if any."""
    if kind_of(run) != "fine-tuning":
        return None
    settings = settings_of(run, "fine-tuning")
    return settings.version if settings.recipe == name else None


def default_size(spec: str) -> str:
    """Return the smallest of B, L and H at least as wide as a backbone's features, or else H.

    Raises: InputError when the backbone cannot be opened.
    """
    is_pixels = spec.partition(":")[0] == "pixels"  # has no random weights
    network = load_backbone(spec, random_init=not is_pixels)  # random weights need no download
    features = getattr(network, "num_features", 0)
    return next((size for size, width in WIDTHS.items() if features <= width), "H")


def changed_constants(used: FinetuneConfig) -> dict[str, tuple[Any, Any]]:
    """Return the constants that differ from the recipe: name -> (recipe's value, used value)."""
    chosen = find_recipe(used.recipe)
    constants = {*chosen.constants, *chosen.sizes[used.size]}
    changes = difference(config(used.recipe, used.size, used.version), used)
    return {name: values for name, values in changes.items() if name in constants}
