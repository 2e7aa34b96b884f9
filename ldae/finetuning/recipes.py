"""The recipes of fine-tuning, by name and version, and their constants for each size of ViT."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldae.downstream.recipes import Recipe, Recipes
from ldae.finetuning.settings import FinetuneConfig

DEFAULT = ""  # there is none: users name the recipe

# MAE (He et al. 2022), main_finetune.py and FINETUNE.md. H differs from L in its drop path rate and
# in the images that are mixed together: the batch of one GPU, 32 on 32 GPUs, for H 16 on 64.
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

RECIPES = Recipes("fine-tuning", {
    "mae": Recipe(2, _MAE, {
        "B": {"optim.epochs": 100.0, "optim.blr": 5e-4, "model.layer_decay": 0.65,
              "model.drop_path": 0.1},
        "L": _LARGE | {"model.drop_path": 0.2},
        "H": _LARGE | {"model.drop_path": 0.3, "augment.mix_images": 16},
    }, former={1: {"augment.mix_images": 32}}),
    "ldae": Recipe(2, _LDAE, {
        "B": {"model.layer_decay": 0.85},
        "L": {"model.layer_decay": 0.65},
        "H": {"model.layer_decay": 0.65},
    }, former={1: {"optim.ema_warmup": False}}),
})  # fmt: skip


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
    return RECIPES.config_on(backbone, recipe, changes, size, run)
