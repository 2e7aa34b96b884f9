"""The start of a pre-training from a plain ViT, and the settings that the start decides."""

from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from ldae import tree
from ldae.backbones.open import load_backbone
from ldae.backbones.whitening import drop_whitening
from ldae.errors import InputError
from ldae.models import DENOISERS
from ldae.models.contract import NoPlainViT
from ldae.models.vit import vit_shape
from ldae.pretraining.images import pixel_stats
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import settings_of
from ldae.settings import UNNAMED_SIZES, Config
from ldae.tokenizers import TOKENIZERS, PatchTokenizer

_PARTS = "model.vit."
_STATISTICS = ("data.mean", "data.std")


def open_start(config: Config, run: Path) -> tuple[Config, VisionTransformer | None]:
    """Open the plain ViT that ``init_from`` names, and take its architecture into the settings.

    Its pixel statistics are taken too, unless the settings or a fitted tokenizer give others. A run
    that resumes has all of this in its own settings, and needs no start.

    Returns: the settings, and the ViT or None.

    Raises: InputError when the ViT cannot be opened, when the run cannot start from it, and when
        the settings name another size or part of the model.
    """
    if not config.init_from:
        return config, None
    if resumed := decided_before(config, run, "pretraining"):
        return resumed, None
    tokenizer = TOKENIZERS[config.tokenizer.name]
    if not issubclass(tokenizer, PatchTokenizer):
        raise InputError(f"init_from needs a patch-wise tokenizer, not {config.tokenizer.name}")
    vit = load_backbone(config.init_from, in_chans=config.data.in_chans)
    try:
        found = DENOISERS[config.model.denoiser].plain_settings(vit)
    except NoPlainViT:
        raise
    except InputError as error:
        raise InputError(f"init_from {config.init_from} is not a plain ViT: {error}") from None
    drop_whitening(vit)
    leaves = tree.flatten_table(found, "model.")
    if not (config.tokenizer.path or any(pixel_stats(config.data))):
        cfg = vit.pretrained_cfg
        leaves |= {"data.mean": tuple(cfg["mean"]), "data.std": tuple(cfg["std"])}
    return decide(config, leaves), vit


def decided_before(config: Any, run: Path, kind: str) -> Any | None:
    """Return the settings with what a start decided for the run in the folder ``run``.

    The result is None when the run has no checkpoint yet.

    Raises: InputError as ``decide``, and when the folder holds a run of another kind.
    """
    if not Checkpoints(run).paths():
        return None
    before = tree.flatten(settings_of(run, kind))
    decided = (*UNNAMED_SIZES, _PARTS, *_STATISTICS)
    return decide(config, {n: v for n, v in before.items() if n.startswith(decided)})


def decide(config: Any, leaves: dict[str, Any]) -> Any:
    """Return the settings of any kind of run with the leaves that its start decides.

    Raises: InputError when the settings name another value of one of them.
    """
    decided = tree.put(config, leaves)
    values = tree.flatten(decided) | _sizes(decided)
    for name, value in _named(config).items():
        if values[name] != value:
            raise InputError(
                f"{name} is {value}, but init_from {config.init_from} has {values[name]}: leave "
                "the setting out, or start from another network"
            )
    return decided


def _named(config: Any) -> dict[str, Any]:
    """Return the sizes, the parts and the statistics that the settings name."""
    given, defaults = tree.flatten(config), tree.flatten(type(config)())
    parts = [name for name in given if name.startswith(_PARTS) and given[name] != defaults[name]]
    statistics = [name for name in _STATISTICS if given[name]]
    return _sizes(config) | {name: given[name] for name in (*parts, *statistics)}


def _sizes(config: Any) -> dict[str, Any]:
    """Return the sizes of the network by dotted name, as far as the settings decide them.

    A ViT that ``model.name`` names gives the sizes that the settings leave open.
    """
    sizes = {
        name.removeprefix("model."): value
        for name, value in tree.flatten(config).items()
        if name in UNNAMED_SIZES
    }
    if name := sizes.pop("name"):
        patch_size = sizes.pop("patch_size")
        shape = vit_shape(name, **sizes)
        sizes = {size: getattr(shape, size) for size in sizes}
        sizes["patch_size"] = patch_size or shape.patch_size
    return {f"model.{size}": value for size, value in sizes.items() if value}
