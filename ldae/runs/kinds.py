"""The kinds of runs: which one a folder holds, and its settings."""

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ldae import tree
from ldae.errors import InputError
from ldae.runs import layout

_LINE = "kind"  # the first line of config.yaml


class Kind(NamedTuple):
    """One kind of run."""

    words: str
    """The kind in a sentence, with an article."""
    settings: str
    """``module:Class`` of the settings, imported when it is needed: it may lie above this file."""

    def defaults(self) -> Any:
        """Return the settings of this kind, all at their defaults."""
        module, name = self.settings.split(":")
        return getattr(import_module(module), name)()


KINDS = {
    "pretraining": Kind("a pre-training", "ldae.settings:Config"),
    "tokenizer": Kind("a tokenizer", "ldae.settings:Config"),
    "fine-tuning": Kind("a fine-tuning", "ldae.finetuning.settings:FinetuneConfig"),
}


def kind_of(folder: Path) -> str | None:
    """Return the kind of the run in ``folder``, or None when the folder holds no run.

    An older folder that can be of a pre-training or of a tokenizer counts as a pre-training.

    Raises: InputError when its config.yaml cannot be read, or names a kind that does not exist.
    """
    found = _possible_kinds(folder)
    return found[0] if found else None


def settings_of(run: Path, kind: str) -> Any:
    """Return the settings of the run in the folder ``run``.

    Raises: InputError when the folder holds no run or a run of another kind, naming that kind.
    """
    path, found = run / layout.CONFIG, _possible_kinds(run)
    if not found:
        lack = f"its {path.name} is of no run" if path.is_file() else f"it has no {path.name}"
        raise InputError(f"{run} is not a run folder: {lack}")
    if kind not in found:
        words, wanted = KINDS[found[0]].words, KINDS[kind].words
        raise InputError(f"run folder {run} holds {words}, not {wanted}")
    return load(path, kind)


def load(path: Path, kind: str, base: Any = None) -> Any:
    """Return ``base`` changed by a YAML file, which may hold all settings or a few of them.

    Args:
        path: the config.yaml of a run, or a file that a user wrote, which needs no line ``kind``.
        kind: the kind of run that the settings are for.
        base: settings of this kind; by default the defaults.

    Raises: InputError naming the file when it cannot be read, is of another kind, or sets what does
        not exist.
    """
    table = tree.read_yaml(path)
    given = table.pop(_LINE, kind)
    if given != kind:
        raise InputError(f"configuration {path} is of the kind {given!r}, not {kind!r}")
    try:
        return tree.update(KINDS[kind].defaults() if base is None else base, table)
    except InputError as error:
        raise InputError(f"configuration {path}: {error}") from None


def to_yaml(config: Any, kind: str) -> str:
    """Return settings as the text of a config.yaml, which ``load`` reads."""
    return f"{_LINE}: {kind}\n{tree.to_yaml(config)}"


def _possible_kinds(folder: Path) -> list[str]:
    """Return the kinds that the run in ``folder`` can be of; none when the folder holds no run.

    There are several only for a folder that was written before runs had a kind, see ``_inferred``.
    """
    if not (folder / layout.CONFIG).is_file():
        return []
    settings = tree.read_yaml(folder / layout.CONFIG)
    if not settings:
        raise InputError(f"run folder {folder} is damaged: its {layout.CONFIG} is empty")
    if _LINE not in settings:
        return _inferred(folder, settings)
    kind = str(settings[_LINE])
    if kind not in KINDS:
        raise InputError(
            f"run folder {folder} is of the kind {kind!r}, and there are {', '.join(KINDS)}"
        )
    return [kind]


def _inferred(folder: Path, settings: dict) -> list[str]:
    """Return the kinds that a run whose config.yaml names none can be of.

    The newest checkpoint says what it trains. Without a checkpoint the names of the settings decide;
    those of a pre-training and of a tokenizer are the same.
    """
    from ldae.runs.checkpoints import Checkpoints  # imports torch

    trained = (Checkpoints(folder).describe() or {}).get("row")
    if trained is None:
        kinds = ("pretraining", "tokenizer", "fine-tuning")
        return [kind for kind in kinds if settings.keys() <= vars(KINDS[kind].defaults()).keys()]
    if trained.startswith("tokenizer of "):
        return ["tokenizer"]
    return ["fine-tuning" if " fine-tuning of " in trained else "pretraining"]
