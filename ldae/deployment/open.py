"""The network that an export writes: the encoder of a run, or any backbone or classifier."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ldae.backbones.open import (
    check_chans,
    finished_folder,
    has_classifier,
    label_names,
    load_backbone,
    load_classifier,
)
from ldae.backbones.run import load_method
from ldae.backbones.whitening import is_whitened
from ldae.deployment.model_card import card_of_network, card_of_run
from ldae.errors import InputError
from ldae.models.contract import NoPlainViT
from ldae.runs.kinds import KINDS, kind_of, pretraining_in, settings_of


class Opened(NamedTuple):
    """A network to export, and what its folder says about it."""

    model: Any
    """In eval mode, with ``model_args`` and ``pretrained_cfg``."""
    card: Callable[[dict | None], str]
    """The record of a whitening, if any -> the model card."""
    classes: list[str]
    """Names of the outputs of a classifier."""
    whitening: dict | None
    """The record of the whitening that the model has."""


def open_network(
    spec: str, timestep: int | None, classifier: bool | None, in_chans: int, license: str
) -> Opened:
    """Open what is exported.

    Raises: InputError when it cannot be opened, and for settings of another kind of network.
    """
    folder, path = finished_folder(spec), Path(spec)
    is_run = folder is not None and kind_of(folder) is not None
    if is_run or (path.is_dir() and folder is None):
        if classifier:
            raise InputError(f"{spec} is a run, which has no classifier")
        opened = _open_run(folder or path, timestep, license)
        check_chans(opened.model, spec, in_chans)
        return opened
    if timestep is not None:
        raise InputError(f"timestep {timestep} is for a run, and {spec} is none")
    if has_classifier(spec) if classifier is None else classifier:
        model = load_classifier(spec, in_chans)
    else:
        model = load_backbone(spec, in_chans=in_chans)
    if not hasattr(model, "model_args"):
        raise InputError(f"{spec} is no timm model, which alone can be exported")
    model.model_args = model.model_args | {"num_classes": model.num_classes}  # without a cut head
    classes = label_names(model) if model.num_classes else []
    # timm writes the names of classes beside the configuration.
    names = ("label_names", "label_descriptions")
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in names}
    model.pretrained_cfg = cfg | {
        "license": license or cfg.get("license"),
        "num_classes": model.num_classes,
        "custom_load": False,
    }
    whitened = read_config(folder).get("whitening") if folder and is_whitened(cfg) else None
    card = partial(card_of_network, spec, folder, model, license)
    return Opened(model, card, classes, whitened)


def _open_run(run: Path, timestep: int | None, license: str) -> Opened:
    kind = pretraining_in(run)
    method, state = load_method(run, kind)
    try:
        exported = KINDS[kind].functions().export(method, timestep)
    except NoPlainViT as error:
        raise InputError(f"{error}: ldae knn and linear grade the run itself") from None
    vit = exported.vit
    vit.images_seen, vit.pretrained_cfg["license"] = state["images_seen"], license or None
    card = partial(card_of_run, run, exported, state, settings_of(run, kind), license)
    return Opened(vit, card, [], None)


def read_config(folder: Path) -> dict:
    """Return config.json of a folder for timm. Raises: OSError and ValueError."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
