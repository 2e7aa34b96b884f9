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
from ldae.runs import layout
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.environment import environment
from ldae.runs.lock import locked
from ldae.settings import ExecutionSettings

NAMES_HASH = "the hash of the images' names"  # in what a checkpoint says about its run
_MAY_CHANGE = ("system.", "data.bad_images", "data.eval_source")  # between the parts of a run


class Settings(Protocol):
    """What a tree of settings holds, of whichever kind of run."""

    data: Any  # with bad_images
    system: ExecutionSettings
    seed: int


@contextmanager
def open_run(
    run: Path,
    config: Settings,
    source: Source,
    device: torch.device,
    unread: tuple[str, ...] = (),
    begun: bool = False,
) -> Iterator[None]:
    """Make the run folder, or check that it is this run's, and hold it against other processes.

    Until there is a checkpoint, or ``begun`` says that there is something else to lose, other settings
    begin anew. ``unread`` are the beginnings of settings that do not matter to this run. The images
    of a run that has a checkpoint may lie elsewhere than they did.

    Raises: InputError when it holds a run of other settings, naming them, or another process has it.
    """
    with locked(run):
        changed = _check_settings(run, config, source, unread, begun)
        distributed.barrier()  # every rank has looked before one of them writes
        if distributed.is_main():
            if changed:
                for name in (layout.TOKENIZER, layout.RECONSTRUCTION):
                    (run / name).unlink(missing_ok=True)
            files.write(run / layout.CONFIG, tree.to_yaml(config).encode())
            record = environment(device) | {"ranks": distributed.world_size()}
            files.write_json(run / layout.ENVIRONMENT, record)
        distributed.barrier()
        yield


def _check_settings(
    run: Path, config: Settings, source: Source, unread: tuple[str, ...], begun: bool
) -> bool:
    """Whether the folder holds a run of other settings, which nobody will miss.

    Raises: InputError when it holds another run, or no run but something else.
    """
    record, before = run / layout.CONFIG, config
    if record.exists():
        before = _settings_of(run, type(config))
    elif run.is_dir() and any(
        path.name not in (layout.LOCK, layout.JOBS) for path in run.iterdir()
    ):
        raise InputError(f"run folder {run} is not empty and holds no run")
    free = (*_MAY_CHANGE, *unread)
    checkpoints = Checkpoints(run)
    known = (checkpoints.describe() or {}).get(NAMES_HASH)
    if known and known == names_hash(source):
        free += ("data.source",)
    changed = tree.difference(before, config)
    changed = {name: pair for name, pair in changed.items() if not name.startswith(free)}
    if changed and (begun or checkpoints.paths()):
        told = ", ".join(
            f"{name} is {old!r} there, {new!r} here" for name, (old, new) in changed.items()
        )
        raise InputError(f"run folder {run} holds another run: {told}; name another --run")
    return bool(changed)


def names_hash(source: Source) -> str:
    """Of the names of the images, in order: the same wherever they lie."""
    digest = hashlib.sha256()
    for number in range(len(source)):
        digest.update(source.name(number).encode() + b"\0")
    return digest.hexdigest()[:16]


def _settings_of(run: Path, kind: type) -> Settings:
    """Raises: InputError when the run folder is not of this kind of run."""
    try:
        if not (run / layout.CONFIG).read_bytes().strip():
            raise InputError(f"its {layout.CONFIG} is empty")
        return tree.load(run / layout.CONFIG, kind())
    except InputError as error:
        raise InputError(f"run folder {run} holds another kind of run: {error}") from None
