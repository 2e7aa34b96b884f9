"""Open a run folder: create it, or check that it holds this run."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ldae import distributed, files, tree
from ldae.console import print_main
from ldae.data.source import Source
from ldae.errors import InputError
from ldae.runs import kinds, layout
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.environment import environment
from ldae.runs.lock import locked
from ldae.settings import ExecutionSettings

NAMES_HASH = "the hash of the images' names"  # a key of checkpoints' descriptions
FINGERPRINT = "the fingerprint of the images"  # another key, for images without names of their own
LABELS_HASH = "the hash of the labels"  # another key, for models that learn them
RESIZED_TWICE = "resized twice"  # another key: whether the images were, as from a cache
LATENTS_OF = "the hash of the latents' tokenizer"  # another key; empty for a training on images
_NUMBER = re.compile(r"(train|eval|all)/\d{6,}")  # the default of Source.name
# Beginnings of the names of settings that may change when a run resumes.
_MAY_CHANGE = ("system.", "data.bad_images", "data.eval_source", "license")
_NOT_OF_A_RUN = (layout.LOCK, layout.JOBS)  # may lie in a folder before a run begins there
# Files that a run writes before its first checkpoint, and that only its settings make valid.
_OF_THE_SETTINGS = (layout.TOKENIZER, layout.RECONSTRUCTION, layout.SKIPPED, layout.WANDB_ID)


class Settings(Protocol):
    """The settings that all kinds of runs have."""

    @property
    def data(self) -> Any:
        """The images, with ``bad_images``."""

    @property
    def system(self) -> ExecutionSettings: ...

    @property
    def seed(self) -> int: ...


@contextmanager
def open_run(
    run: Path,
    kind: str,
    config: Settings,
    source: Source,
    device: torch.device,
    ignored: tuple[str, ...] = (),
    fixed: bool = False,
) -> Iterator[None]:
    """Open the folder ``run`` for a new or resumed run, and keep other processes out.

    A run in the folder must be of this kind, with these settings and images. Before
    its first checkpoint, a run of this kind may start again with other settings and images.

    Args:
        run: the folder, which is created if there is none.
        kind: one of ``kinds.KINDS``.
        config: the settings.
        source: the training images; those of a run with a checkpoint may have moved.
        device: recorded in environment.json.
        ignored: prefixes of dotted names of settings that this run does not read.
        fixed: whether the settings may not change, even if there is no checkpoint.

    Raises: InputError when the folder holds something else or another run, naming its kind or the
        settings that differ; and when another process uses the folder.
    """
    if not kinds.kind_of(run):
        _check_outside(run, source)
    with locked(run):
        before, images = _settings_before(run, kind), images_hashes(source)
        changed = {} if before is None else _changed(run, before, config, source, ignored)
        known = files.read_object(run / layout.ENVIRONMENT).get("images", {})
        if isinstance(known, str):  # as older versions wrote it
            known = {NAMES_HASH: known}
        if not Checkpoints(run).paths():  # a checkpoint knows its images itself
            pairs = {name: (value, images.get(name)) for name, value in known.items()}
            changed |= {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        if changed and (fixed or Checkpoints(run).paths()):
            names = ", ".join(
                f"{name} is {old!r} there, {new!r} here" for name, (old, new) in changed.items()
            )
            longer = "optim.epochs" in changed and hasattr(config, "init_from")
            go_on = f", and --init-from {run} to go on from this one" if longer else ""
            raise InputError(
                f"run folder {run} holds another run: {names}; name another --run{go_on}"
            )
        distributed.barrier()  # all ranks read the folder before rank 0 writes to it
        if distributed.is_main():
            if changed:
                for name in _OF_THE_SETTINGS:
                    (run / name).unlink(missing_ok=True)
            files.write(run / layout.CONFIG, kinds.to_yaml(config, kind).encode())
            record = environment(device) | {"ranks": distributed.world_size(), "images": images}
            files.write_json(run / layout.ENVIRONMENT, record)
        distributed.barrier()
        yield


def _settings_before(run: Path, kind: str) -> Settings | None:
    """Return the settings of the run in the folder, or None when the folder is new.

    Raises: InputError when the folder holds a run of another kind, or something else.
    """
    if kinds.kind_of(run):
        return kinds.settings_of(run, kind)
    names = [path.name for path in run.iterdir()] if run.is_dir() else []
    if any(name not in _NOT_OF_A_RUN and not name.endswith(files.PARTIAL) for name in names):
        raise InputError(f"run folder {run} is not empty and holds no run")
    return None


def _check_outside(run: Path, source: Source) -> None:
    """Refuse a folder among the images, which would be other ones with the pictures of the run."""
    folder = Path(source.spec).expanduser()
    if source.split == "all" and folder.is_dir():
        if run.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"run folder {run} lies among the images {folder}: name another --run")


def _changed(
    run: Path, before: Settings, config: Settings, source: Source, ignored: tuple[str, ...]
) -> dict[str, tuple[Any, Any]]:
    """Return the changed settings that make this another run: dotted name -> (old, new)."""
    ignored = (*_MAY_CHANGE, *ignored)
    described = Checkpoints(run).describe() or {}
    if images_hashes(source).items() <= described.items():
        ignored += ("data.source",)
        there, here = before.data.source, config.data.source
        if there != here:
            print_main(f"{here} in place of {there}: their images have the same names")
        if described.get(LATENTS_OF) == source.latents_of:
            ignored += ("data.latents",)
    changed = tree.difference(before, config)
    return {name: pair for name, pair in changed.items() if not name.startswith(ignored)}


def images_hashes(source: Source) -> dict[str, str]:
    """Return the hashes by which a run that resumes knows its images.

    The names of files, in order, tell it wherever the files lie and whenever they were copied.
    Images that only have numbers are known by their fingerprint too.
    """
    digest = hashlib.sha256()
    for number in range(len(source)):
        digest.update(source.name(number).encode() + b"\0")
    hashes = {NAMES_HASH: digest.hexdigest()[:16]}
    if _NUMBER.fullmatch(source.name(0)):
        hashes[FINGERPRINT] = source.fingerprint()[:16]
    return hashes


def labels_hash(source: Source) -> str:
    """Return a hash of the names of the classes and of the label of each image, in order."""
    digest = hashlib.sha256("\0".join(source.classes or ()).encode("utf-8", "backslashreplace"))
    if source.labels is not None:
        digest.update(source.labels.astype(np.int64).tobytes())
    return digest.hexdigest()[:16]
