"""The recipes of a detection by name, and their constants for each size of ViT."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldae.detection.settings import DetectConfig
from ldae.downstream.recipes import Recipe, Recipes

DEFAULT = "vitdet"

# ViTDet (Li et al. 2022) on COCO, mask_rcnn_vitdet_{b,l,h} of detectron2. 1e-4 at batch 64 is a blr
# of 4e-4, and 250 steps of warm-up are 0.14 epochs. Its rate falls in two steps at the end; ours
# falls by a cosine, as in all trainings here. docs/detection.md lists all differences.
_VITDET = {
    "augment.scale": (0.1, 2.0), "augment.flip": 0.5,
    "model.frozen": False, "model.masks": True,
    "model.dim": 256, "model.rpn_convs": 2, "model.box_convs": 4, "model.box_dim": 1024,
    "model.mask_convs": 4, "model.proposals": 1000, "model.rois": 512,
    "optim.batch_size": 64, "optim.blr": 4e-4, "optim.warmup_epochs": 0.14, "optim.min_lr": 0.0,
    "optim.weight_decay": 0.1, "optim.betas": (0.9, 0.999), "optim.clip_grad": 0.0,
    "optim.ema": 0.0, "optim.ema_warmup": False,
}  # fmt: skip

# For digit-scenes, in minutes on two cores: a small network, and little jitter, since a mirrored or
# tiny digit is another one or none.
_SCENES = _VITDET | {
    "data.img_size": 64,
    "augment.scale": (0.8, 1.25), "augment.flip": 0.0,
    "model.dim": 64, "model.rpn_convs": 1, "model.box_convs": 0, "model.box_dim": 256,
    "model.mask_convs": 1, "model.proposals": 100, "model.rois": 32,
    "optim.batch_size": 16, "optim.blr": 8e-3, "optim.epochs": 4.0, "optim.warmup_epochs": 0.2,
    "optim.clip_grad": 1.0,
}  # fmt: skip

_SMALL = {"model.layer_decay": 0.7, "model.drop_path": 0.1}
_MIDDLE = {"model.layer_decay": 0.8, "model.drop_path": 0.4}
_LARGE = {"model.layer_decay": 0.9, "model.drop_path": 0.5}

RECIPES = Recipes("detection", {
    "vitdet": Recipe(1, _VITDET, {
        "B": _SMALL | {"optim.epochs": 100.0},
        "L": _MIDDLE | {"optim.epochs": 100.0},
        "H": _LARGE | {"optim.epochs": 75.0},
    }),
    "scenes": Recipe(1, _SCENES, {"B": _SMALL, "L": _MIDDLE, "H": _LARGE}),
})  # fmt: skip


def detect_config(
    backbone: str | Path,
    recipe: str = DEFAULT,
    changes: Mapping[str, Any] | None = None,
    *,
    size: str = "",
    run: str | Path | None = None,
) -> DetectConfig:
    """Return the settings of a detection: a backbone by a recipe.

    Args:
        backbone: a run folder, an exported folder, a timm name or NAME@FILE.
        recipe: vitdet, for COCO; or scenes, for digit-scenes in minutes.
        changes: dotted name of a setting -> value, such as ``data.source``.
        size: B, L or H, which the constants are for; by default from the backbone's width.
        run: a run folder: a detection that it holds keeps the version of the recipe that it began
            with.

    Raises: InputError for a recipe, size or setting that does not exist, and for a backbone that
        cannot be opened.

    Examples:
        >>> changes = {"data.source": "/data/coco", "model.frozen": True}
        >>> config = ldae.detect_config("runs/l_dae", changes=changes)
        >>> ldae.detect(config, "runs/detector")["results"]["box_ap"]
    """
    return RECIPES.config_on(backbone, recipe, changes, size, run)
