"""The kinds of runs, and the kind and settings of the run in a folder."""

import os
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldae import tree
from ldae.errors import InputError
from ldae.runs import layout

if TYPE_CHECKING:
    import torch
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

_KEY = "kind"  # the key in the first line of config.yaml


class Exported(NamedTuple):
    """The encoder of a run as a timm ViT, and what its model card says about it."""

    vit: "VisionTransformer"
    """In eval mode, with the ``model_args`` by which timm builds it and a ``pretrained_cfg``."""
    tag: str
    """The hub's name of the method."""
    description: str
    """How the encoder was pre-trained, and what its features are."""
    facts: dict[str, str]
    """Further lines of the card's table."""
    graded: str = ""
    """How the scores on the card were measured, after "measured on the run"."""


class Opening(NamedTuple):
    """The functions by which graders and the export open a pre-training of one kind.

    Its method is the network in training: uint8 images, positions and labels -> loss.
    """

    build: Callable[..., "nn.Module"]
    """(settings, num_classes) -> the method, with weights drawn from the seed."""
    backbone: Callable[[Any, bool], "nn.Module"]
    """(method, verify) -> its encoder as a backbone: normalised (B, C, H, W) -> features (B, D).

    With ``verify`` it raises InputError when the backbone's features are not the encoder's.
    """
    control: Callable[[Any], "VisionTransformer"]
    """method -> the untrained control: timm's ViT of the architecture, with random weights."""
    export: Callable[[Any, int | None], Exported]
    """(method, timestep or None) -> its encoder for timm.

    It raises ``NoPlainViT`` for an encoder that timm does not have.
    """
    reconstruct: Callable[..., tuple["torch.Tensor", "torch.Tensor"]] | None = None
    """(method, images, positions, level) -> reconstructed and clean pictures (B, C, H, W).

    Their values are in [0, 1]. The images are uint8 (B, C, H, W), and the positions (B,) determine
    the noise. ``level``, 0 to 1, is a place in the noise schedule, or the share of the patches that
    are masked. A kind without such a function trains no reconstruction.
    """


class Kind(NamedTuple):
    """One kind of run.

    Its modules are imported when needed, since they may import this one.
    """

    noun: str
    """The name in a sentence, with an article."""
    settings: str
    """``module:Class`` of the settings."""
    recipes: str = ""
    """The module of the recipes that a command takes by name, see ``ldae.pretraining.recipes``."""
    opening: str = ""
    """``module:NAME`` of the ``Opening``; empty for a kind that pre-trains no encoder."""
    training: str = ""
    """``module:function`` that pre-trains in a folder or resumes there.

    Its arguments are the settings, the folder, the name of the recipe and ``dry_run``.
    """

    def defaults(self) -> Any:
        """Return the default settings of this kind."""
        return pkgutil.resolve_name(self.settings)()

    def functions(self) -> Opening:
        """Return the functions that open a pre-training of this kind."""
        return pkgutil.resolve_name(self.opening)

    def pretrain(self, config: Any, run: Path, row: str, dry_run: bool = False) -> None:
        """Pre-train in the folder ``run`` by the settings ``config``, or resume there."""
        pkgutil.resolve_name(self.training)(config, run, row, dry_run)


KINDS = {
    "pretraining": Kind(
        "a denoising pre-training run",
        "ldae.settings:Config",
        "ldae.trajectory",
        "ldae.backbones.run:DENOISING",
        "ldae.pretraining.denoising:pretrain",
    ),
    "mae": Kind(
        "an MAE pre-training run",
        "ldae.mae.settings:MAEConfig",
        "ldae.mae.recipes",
        "ldae.mae.open:OPENING",
        "ldae.mae.pretraining:pretrain",
    ),
    "tokenizer": Kind("a tokenizer run", "ldae.settings:Config", "ldae.trajectory"),
    "fine-tuning": Kind("a fine-tuning run", "ldae.finetuning.settings:FinetuneConfig"),
    "detection": Kind("a detection run", "ldae.detection.settings:DetectConfig"),
}


def pretrainings() -> list[str]:
    """Return the kinds that pre-train an encoder."""
    return [name for name, kind in KINDS.items() if kind.training]


def kind_with(settings: Any) -> Kind:
    """Return the kind of pre-training that has settings of this class."""
    kinds = (KINDS[name] for name in pretrainings())
    return next(kind for kind in kinds if type(kind.defaults()) is type(settings))


def kind_of(folder: Path) -> str | None:
    """Return the kind of the run in ``folder``, or None when the folder holds no run.

    An older folder of either a pre-training or a tokenizer counts as a pre-training.

    Raises: InputError when its config.yaml cannot be read, or names an unknown kind.
    """
    return next(iter(_possible_kinds(folder)), None)


def settings_of(run: Path, kind: str) -> Any:
    """Return the settings of the run in the folder ``run``.

    Raises: InputError when the folder holds no run or a run of another kind, naming that kind.
    """
    kinds = _possible_kinds(run)
    if not kinds:
        raise _no_run(run)
    if kind not in kinds:
        raise InputError(f"run folder {run} holds {KINDS[kinds[0]].noun}, not {KINDS[kind].noun}")
    return load(run / layout.CONFIG, kind)


def pretraining_in(run: Path) -> str:
    """Return the kind of the pre-training in the folder ``run``.

    Raises: InputError when the folder holds no pre-training, naming the kind of its run.
    """
    kind = kind_of(run)
    if kind is None:
        raise _no_run(run)
    if kind not in pretrainings():
        raise InputError(f"run folder {run} holds {KINDS[kind].noun}, not a pre-training run")
    return kind


def settings_and_folder(
    config: Any, run: str | Path | None, kinds: Sequence[str]
) -> tuple[str, Any, Path]:
    """Return the kind, the settings and the folder of a run that is to start or to resume.

    Args:
        config: settings of one of the ``kinds``; or the folder of such a run, which has its own.
        run: the run folder, unless ``config`` is one.
        kinds: one kind, or those that pre-train.

    Raises: InputError when the settings or the folder are missing, or are of another kind.
    """
    if isinstance(config, str | Path):
        if run is not None:
            raise InputError(
                f"{str(config)!r} is not settings: pass those of ldae.config with a run folder, or "
                "only the folder of a run to resume"
            )
        run = Path(os.path.expanduser(config))
        kind = kinds[0] if len(kinds) == 1 else pretraining_in(run)
        return kind, settings_of(run, kind), run
    nouns = " or ".join(KINDS[kind].noun for kind in kinds)
    fitting = [kind for kind in kinds if type(config) is type(KINDS[kind].defaults())]
    if not fitting:
        raise InputError(f"config must be the settings of {nouns}, not {type(config).__name__}")
    if run is None:
        raise InputError("settings need a run folder, new or to resume: pass run too")
    return fitting[0], config, Path(os.path.expanduser(run))


def _no_run(folder: Path) -> InputError:
    path = folder / layout.CONFIG
    reason = (
        f"its {path.name} does not belong to a run" if path.is_file() else f"it has no {path.name}"
    )
    return InputError(f"{folder} is not a run folder: {reason}")


def kind_of_file(path: Path) -> str | None:
    """Return the kind that a YAML file of settings names, if any. Raises: as ``load``."""
    return tree.read_yaml(path).get(_KEY)


def load(path: Path, kind: str, base: Any = None) -> Any:
    """Return ``base`` changed by a YAML file of all or some settings.

    Args:
        path: the config.yaml of a run, or a user's file, in which ``kind`` is optional.
        kind: the kind of run that the settings are for.
        base: settings of this kind; by default the kind's defaults.

    Raises: InputError naming the file when it cannot be read, is of another kind, or holds an
        unknown setting.
    """
    table = tree.read_yaml(path)
    given = table.pop(_KEY, kind)
    if given != kind:
        raise InputError(f"configuration {path} is of the kind {given!r}, not {kind!r}")
    try:
        base = KINDS[kind].defaults() if base is None else base
        return tree.replace(base, tree.flatten_table(table))
    except InputError as error:
        raise InputError(f"configuration {path}: {error}") from None


def to_yaml(config: Any, kind: str) -> str:
    """Return the content of a config.yaml with these settings, for ``load``."""
    return f"{_KEY}: {kind}\n{tree.to_yaml(config)}"


def _possible_kinds(folder: Path) -> list[str]:
    """Return the possible kinds of the run in ``folder``; an empty list when there is no run.

    Only a folder written before runs had a kind may have several, see ``_infer_kinds``.
    """
    if not (folder / layout.CONFIG).is_file():
        return []
    settings = tree.read_yaml(folder / layout.CONFIG)
    if not settings:
        raise InputError(f"run folder {folder} is damaged: its {layout.CONFIG} is empty")
    if _KEY not in settings:
        return _infer_kinds(folder, settings)
    kind = str(settings[_KEY])
    if kind not in KINDS:
        raise InputError(
            f"run folder {folder} is of the unknown kind {kind!r}; kinds are {', '.join(KINDS)}"
        )
    return [kind]


def _infer_kinds(folder: Path, settings: dict) -> list[str]:
    """Return the possible kinds of a run whose config.yaml has no ``kind``.

    The newest checkpoint names the model that it trains. Without a checkpoint, the names of the
    settings decide, which are the same for a pre-training and a tokenizer.
    """
    from ldae.runs.checkpoints import Checkpoints  # imports torch

    trained = (Checkpoints(folder).describe() or {}).get("row")
    if trained is None:
        kinds = ("pretraining", "tokenizer", "fine-tuning")
        return [kind for kind in kinds if settings.keys() <= vars(KINDS[kind].defaults()).keys()]
    if trained.startswith("tokenizer of "):
        return ["tokenizer"]
    return ["fine-tuning" if " fine-tuning of " in trained else "pretraining"]
