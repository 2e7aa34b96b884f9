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
    if Checkpoints(run).paths():
        before = tree.flatten(settings_of(run, "pretraining"))
        decided = (*UNNAMED_SIZES, _PARTS, *_STATISTICS)
        return _put(config, {n: v for n, v in before.items() if n.startswith(decided)}), None
    tokenizer = TOKENIZERS[config.tokenizer.name]
    if not issubclass(tokenizer, PatchTokenizer):
        raise InputError(f"init_from needs a patch-wise tokenizer, not {tokenizer.__name__}")
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
    return _put(config, leaves), vit


def _put(config: Config, leaves: dict[str, Any]) -> Config:
    """Return the settings with the leaves that a start decides.

    Raises: InputError when the settings name another value of one of them.
    """
    decided = tree.put(config, leaves)
    values = _sizes(decided)
    for name, value in (_sizes(config) | _parts(config)).items():
        if (other := values.get(name, tree.flatten(decided)[name])) != value:
            raise InputError(f"{name} is {value}, and init_from {config.init_from} has {other}")
    return decided


def _sizes(config: Config) -> dict[str, Any]:
    """Return the sizes that the settings name, or ``model.name`` for them, without that name."""
    model = config.model
    sizes = {name: getattr(model, name.removeprefix("model.")) for name in UNNAMED_SIZES}
    if name := sizes.pop("model.name"):
        shape = vit_shape(name, model.depth, model.embed_dim, model.num_heads, model.mlp_ratio)
        sizes = {
            size: value or getattr(shape, size.removeprefix("model."))
            for size, value in sizes.items()
        }
    return {size: value for size, value in sizes.items() if value}


def _parts(config: Config) -> dict[str, Any]:
    """Return the settings with values of their own that say more than sizes."""
    parts = tree.difference(type(config.model.vit)(), config.model.vit)
    named = {_PARTS + name: value for name, (_, value) in parts.items()}
    given = tree.flatten(config)
    return named | {name: given[name] for name in _STATISTICS if given[name]}
