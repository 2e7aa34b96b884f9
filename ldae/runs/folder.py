"""Open a run folder: make it, or check that it holds this run."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from ldae import distributed, files, tree
from ldae.data.source import Source
from ldae.errors import InputError
from ldae.runs import kinds, layout
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.environment import environment
from ldae.runs.lock import locked
from ldae.settings import ExecutionSettings

NAMES_HASH = "the hash of the images' names"  # in what a checkpoint says about its run
_MAY_CHANGE = ("system.", "data.bad_images", "data.eval_source")  # when a run is resumed
_NOT_OF_A_RUN = (layout.LOCK, layout.JOBS)  # in a folder where no run has begun
# Made before the first checkpoint, and not of use to a run with other settings.
_OF_THE_SETTINGS = (layout.TOKENIZER, layout.RECONSTRUCTION, layout.WANDB_ID)


class Settings(Protocol):
    """The part of the settings that every kind of run has."""

    data: Any  # with bad_images
    system: ExecutionSettings
    seed: int


@contextmanager
def open_run(
    run: Path,
    kind: str,
    config: Settings,
    source: Source,
    device: torch.device,
    unread: tuple[str, ...] = (),
    begun: bool = False,
) -> Iterator[None]:
    """Open the folder ``run`` for this run, new or resumed, and keep other processes out meanwhile.

    A run in the folder has to be this run: of this kind, with these settings and these images. Until
    there is a checkpoint, a run of this kind may begin anew with other settings.

    Args:
        run: the folder, which is made if it is not there.
        kind: one of ``kinds.KINDS``.
        config: the settings.
        source: the training images. Those of a run with a checkpoint may lie elsewhere than before.
        device: where the run is computed, for the record.
        unread: beginnings of dotted names of settings that do not matter to this run.
        begun: whether the folder holds something that must not be lost, though no checkpoint.

    Raises: InputError when the folder holds another run, naming the kind or the settings that
        differ, or something else; and when another process works in it.
    """
    with locked(run):
        before = _settings_before(run, kind)
        changed = {} if before is None else _changed(run, before, config, source, unread)
        if changed and (begun or Checkpoints(run).paths()):
            told = ", ".join(
                f"{name} is {old!r} there, {new!r} here" for name, (old, new) in changed.items()
            )
            raise InputError(f"run folder {run} holds another run: {told}; name another --run")
        distributed.barrier()  # every rank has looked before one of them writes
        if distributed.is_main():
            for name in _OF_THE_SETTINGS if changed else ():
                (run / name).unlink(missing_ok=True)
            files.write(run / layout.CONFIG, kinds.to_yaml(config, kind).encode())
            record = environment(device) | {"ranks": distributed.world_size()}
            files.write_json(run / layout.ENVIRONMENT, record)
        distributed.barrier()
        yield


def _settings_before(run: Path, kind: str) -> Settings | None:
    """Return the settings of the run that the folder holds, or None when the folder is new.

    Raises: InputError when it holds a run of another kind, or no run but something else.
    """
    if kinds.kind_of(run):
        return kinds.settings_of(run, kind)
    if run.is_dir() and any(path.name not in _NOT_OF_A_RUN for path in run.iterdir()):
        raise InputError(f"run folder {run} is not empty and holds no run")
    return None


def _changed(
    run: Path, before: Settings, config: Settings, source: Source, unread: tuple[str, ...]
) -> dict[str, tuple[Any, Any]]:
    """Return the settings that make this another run: dotted name -> (old value, new value)."""
    free = (*_MAY_CHANGE, *unread)
    known = (Checkpoints(run).describe() or {}).get(NAMES_HASH)
    if known and known == names_hash(source):
        free += ("data.source",)
    changed = tree.difference(before, config)
    return {name: pair for name, pair in changed.items() if not name.startswith(free)}


def names_hash(source: Source) -> str:
    """Return a hash of the images' names, in order: the same wherever the images lie."""
    digest = hashlib.sha256()
    for number in range(len(source)):
        digest.update(source.name(number).encode() + b"\0")
    return digest.hexdigest()[:16]
