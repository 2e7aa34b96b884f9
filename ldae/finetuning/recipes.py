"""The recipes of fine-tuning by name and version, with what depends on the size of the network."""

from dataclasses import dataclass, field
from typing import Any

from ldae.backbones.open import load_backbone
from ldae.errors import InputError, unknown
from ldae.finetuning.settings import FinetuneConfig
from ldae.tree import difference, replace

WIDTHS = {"B": 768, "L": 1024, "H": 1280}
"""Of the ViTs that recipes are published for, in numbers a token."""


@dataclass(frozen=True)
class Recipe:
    """Every constant of a recipe: those of all sizes, and those of each."""

    name: str
    version: int
    summary: str
    constants: dict[str, Any] = field(hash=False)
    sizes: dict[str, dict[str, Any]] = field(hash=False)


# MAE, main_finetune.py and FINETUNE.md. H has the constants of L but for its drop path.
_MAE = {
    "augment.min_area": 0.08, "augment.flip": 0.5, "augment.policy": "rand-m9-mstd0.5-inc1",
    "augment.erasing": 0.25, "augment.mixup": 0.8, "augment.cutmix": 1.0,
    "augment.mix_prob": 1.0, "augment.switch_prob": 0.5, "augment.mix_images": 32,
    "augment.label_smoothing": 0.1,
    "model.pool": "fc_norm", "model.head_std": 2e-5,
    "optim.batch_size": 1024, "optim.weight_decay": 0.05, "optim.betas": (0.9, 0.999),
    "optim.warmup_epochs": 5.0, "optim.min_lr": 1e-6, "optim.clip_grad": 0.0, "optim.ema": 0.0,
}  # fmt: skip

_LARGE = {"optim.epochs": 50.0, "optim.blr": 1e-3, "model.layer_decay": 0.75}

# The paper, table of its appendix. What it leaves unsaid is MAE's, whose probe it says it follows;
# 4e-3 at batch 1024 is a blr of 1e-3. H is not in it and gets what L has.
_LDAE = _MAE | {
    "optim.blr": 1e-3, "optim.epochs": 100.0, "optim.ema": 0.9999, "model.drop_path": 0.1,
}  # fmt: skip

RECIPES = (
    Recipe("mae", 1, "MAE's (He et al. 2022)", _MAE, {
        "B": {"optim.epochs": 100.0, "optim.blr": 5e-4, "model.layer_decay": 0.65,
              "model.drop_path": 0.1},
        "L": _LARGE | {"model.drop_path": 0.2},
        "H": _LARGE | {"model.drop_path": 0.3},
    }),
    Recipe("ldae", 1, "the l-DAE paper's (Chen et al. 2024)", _LDAE, {
        "B": {"model.layer_decay": 0.85},
        "L": {"model.layer_decay": 0.65},
        "H": {"model.layer_decay": 0.65},
    }),
)  # fmt: skip


def recipe(name: str) -> Recipe:
    """Raises: InputError with the nearest name when there is none."""
    for candidate in RECIPES:
        if candidate.name == name:
            return candidate
    names = [candidate.name for candidate in RECIPES]
    raise unknown("there is no recipe", name, names, f", and there are {', '.join(names)}")


def config(name: str = "mae", size: str = "B") -> FinetuneConfig:
    """The settings of a recipe for the size of a network.

    Raises: InputError for a recipe or a size that does not exist.
    """
    found = recipe(name)
    if size not in found.sizes:
        raise InputError(f"there is no size {size!r}; there are {', '.join(found.sizes)}")
    head = {"recipe": found.name, "version": found.version, "size": size}
    return replace(FinetuneConfig(), head | found.constants | found.sizes[size])


def size_of(spec: str) -> str:
    """The smallest of B, L and H that is at least as wide as the features of a backbone; or H.

    Raises: InputError when it can not be opened.
    """
    is_pixels = spec.partition(":")[0] == "pixels"  # which has no random weights
    network = load_backbone(spec, random_init=not is_pixels)  # no download for a number
    features = getattr(network, "num_features", 0)
    return next((size for size, width in WIDTHS.items() if features <= width), "H")


def changed(used: FinetuneConfig) -> dict[str, tuple[Any, Any]]:
    """The constants that are not the recipe's: name -> (the recipe's, the used one)."""
    own = config(used.recipe, used.size)
    found = difference(own, used)
    return {name: pair for name, pair in found.items() if name in _constants(used)}


def _constants(used: FinetuneConfig) -> set[str]:
    found = recipe(used.recipe)
    return {*found.constants, *found.sizes[used.size]}
