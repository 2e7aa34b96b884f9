"""Open a run folder: create it, or check that it holds this run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from ldae import distributed, files, tree
from ldae.console import print_main
from ldae.data.open import check_outside
from ldae.data.source import Source
from ldae.errors import InputError
from ldae.runs import kinds, layout
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.environment import environment
from ldae.runs.identity import LATENTS_OF, NAMES_HASH, images_hashes
from ldae.runs.lock import locked
from ldae.settings import ExecutionSettings

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

    A run in the folder must be of this kind, with these settings and images. Before its first
    checkpoint, a run of this kind may start again with other settings and images.

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
        check_outside(run, source, "--run")
    with locked(run):
        before = _settings_before(run, kind)
        differences = {} if before is None else _differences(run, before, config, source, ignored)
        if differences and (fixed or Checkpoints(run).paths()):
            raise _refusal(run, differences)
        distributed.barrier()  # all ranks read the folder before rank 0 writes to it
        if distributed.is_main():
            if differences:
                for name in _OF_THE_SETTINGS:
                    (run / name).unlink(missing_ok=True)
            _write(run, kind, config, source, device)
        distributed.barrier()
        yield


def how_to_go_on(run: Path) -> str:
    """Return the end of a refusal: how another pre-training starts from the one in a folder.

    It is empty for a run that no pre-training starts from.
    """
    kind = kinds.kind_of(run)
    if kind not in kinds.pretrainings() or not hasattr(kinds.KINDS[kind].defaults(), "init_from"):
        return ""
    return (
        f", and {run / layout.CONFIG} in the place of the row with --init-from {run} to go on from "
        "this one"
    )


def _settings_before(run: Path, kind: str) -> Settings | None:
    """Return the settings of the run in the folder, or None when the folder is new.

    Raises: InputError when the folder holds a run of another kind, or something else.
    """
    if kinds.kind_of(run):
        return kinds.settings_of(run, kind)
    names = [path.name for path in run.iterdir()] if run.is_dir() else []
    if any(name not in _NOT_OF_A_RUN and not name.endswith(files.PARTIAL) for name in names):
        raise InputError(
            f"folder {run} holds other files and no run: name an empty or new folder by --run"
        )
    return None


def _differences(
    run: Path, before: Settings, config: Settings, source: Source, ignored: tuple[str, ...]
) -> dict[str, tuple[Any, Any]]:
    """Return what makes this another run: a setting, or a fact about its images -> (old, new)."""
    described, images = Checkpoints(run).describe() or {}, images_hashes(source)
    ignored = (*_MAY_CHANGE, *ignored)
    if images.items() <= described.items():
        ignored += ("data.source",)
        there, here = before.data.source, config.data.source
        if there != here:
            print_main(f"{here} in place of {there}: their images have the same names")
        if described.get(LATENTS_OF) == source.latents_of:
            ignored += ("data.latents",)
    settings = tree.difference(before, config).items()
    differences = {name: pair for name, pair in settings if not name.startswith(ignored)}
    if not described or "data.source" in differences:  # else the training compares the images
        known = described or _images_at_the_start(run)
        pairs: dict[str, Any] = {"the number of images": (known.get("images"), len(source))}
        pairs |= {name: (known.get(name), value) for name, value in images.items()}
        differ = [name for name, (old, new) in pairs.items() if old not in (None, new)]
        differences |= {name: pairs[name] for name in differ[:1]}
    return differences


def _images_at_the_start(run: Path) -> dict[str, str]:
    """Return the hashes of the images with which a run without a checkpoint has started."""
    known = files.read_object(run / layout.ENVIRONMENT).get("images", {})
    return {NAMES_HASH: known} if isinstance(known, str) else known  # of an older version


def _refusal(run: Path, differences: dict[str, tuple[Any, Any]]) -> InputError:
    names = ", ".join(
        f"{name} is {old!r} there, {new!r} here" for name, (old, new) in differences.items()
    )
    goes_on = {"data.source", "optim.epochs"} & differences.keys()
    advice = f"name another --run{how_to_go_on(run) if goes_on else ''}"
    return InputError(f"run folder {run} holds another run: {names}; {advice}")


def _write(run: Path, kind: str, config: Settings, source: Source, device: torch.device) -> None:
    """Write the settings, and the environment with the hashes of the images."""
    files.write(run / layout.CONFIG, kinds.to_yaml(config, kind).encode())
    images = {"ranks": distributed.world_size(), "images": images_hashes(source)}
    files.write_json(run / layout.ENVIRONMENT, environment(device) | images)
