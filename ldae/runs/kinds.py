"""The kinds of runs, and the kind and settings of the run in a folder."""

import pkgutil
from pathlib import Path
from typing import Any, NamedTuple

from ldae import tree
from ldae.errors import InputError
from ldae.runs import layout

_KEY = "kind"  # of the first line of config.yaml


class Kind(NamedTuple):
    """One kind of run."""

    noun: str
    """The name in a sentence, with an article."""
    settings: str
    """``module:Class`` of the settings, imported when needed: the module may import this one."""

    def defaults(self) -> Any:
        """Return the default settings of this kind."""
        return pkgutil.resolve_name(self.settings)()


KINDS = {
    "pretraining": Kind("a pre-training", "ldae.settings:Config"),
    "tokenizer": Kind("a tokenizer", "ldae.settings:Config"),
    "fine-tuning": Kind("a fine-tuning", "ldae.finetuning.settings:FinetuneConfig"),
}


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
    path, kinds = run / layout.CONFIG, _possible_kinds(run)
    if not kinds:
        reason = f"its {path.name} is of no run" if path.is_file() else f"it has no {path.name}"
        raise InputError(f"{run} is not a run folder: {reason}")
    if kind not in kinds:
        raise InputError(f"run folder {run} holds {KINDS[kinds[0]].noun}, not {KINDS[kind].noun}")
    return load(path, kind)


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
