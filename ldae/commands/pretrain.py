"""``ldae pretrain``: pre-train a row of the paper, or a rival such as MAE."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ldae import tree
from ldae.auto.scale import HOURS, settled
from ldae.errors import InputError
from ldae.precision import recorded_gradients
from ldae.pretraining.open import Run
from ldae.pretraining.recipes import name_of
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.folder import Settings
from ldae.runs.kinds import KINDS, pretrainings, settings_and_folder


@recorded_gradients()
def pretrain(
    config: Settings | str | Path,
    run: str | Path | None = None,
    row: str = "",
    dry_run: bool = False,
    *,
    scale: Literal["", "auto"] = "",
    hours: float | None = None,
    keep: Iterable[str] = (),
) -> Run:
    """Pre-train by the settings ``config`` in the folder ``run``, or resume the run there.

    The folder gets config.yaml, environment.json, metrics.jsonl, checkpoints/ and the files of the
    kind of pre-training, such as pictures. A finished run stays as it is. A dry run prints the
    settings and the plan, and writes nothing.

    Args:
        config: the settings, such as ``ldae.config`` returns; or a run folder, and no ``run``, to
            resume it by its own settings.
        run: the run folder, new or to resume.
        row: the name of the recipe in the records, which is also what the scale auto begins with;
            by default the one that the run has there already, or else the row whose settings these
            are.
        dry_run: print the settings and the plan, and stop.
        scale: ``auto`` chooses the sizes of images, patches and network, the length, the batch and
            the workers of a new run by its images, this machine and ``hours``, and prints why.
            The run has them as plain settings. What differs in ``config`` from the recipe at the
            scale paper is yours, and stays.
        hours: the time that a run at the scale auto may take; by default 4.
        keep: dotted names of further settings that the scale auto leaves as they are.

    Returns: the run, opened.

    Raises: InputError for wrong settings or data; Interrupted after a stop signal.

    Examples:
        >>> changes = {"data.source": "photos/", "optim.epochs": 100}
        >>> config = ldae.config("l_dae", scale="small", changes=changes)
        >>> run = ldae.pretrain(config, "runs/photos")
        >>> run = ldae.pretrain("runs/photos")  # resumes, after a kill
        >>> config = ldae.config("l_dae", changes={"data.source": "photos/"})
        >>> run = ldae.pretrain(config, "runs/auto", scale="auto", hours=4)
    """
    if scale not in ("", "auto"):
        raise InputError(f"scale must be auto, not {scale!r}: ldae.config takes the other scales")
    if not scale and hours is not None:
        raise InputError("hours are for the scale auto: another scale has its own optim.epochs")
    kind, config, run = settings_and_folder(config, run, pretrainings())
    tree.check(config)
    before = Checkpoints(run).describe() or {}
    row = row or before.get("row") or name_of(config, kind)
    if scale:
        given = HOURS if hours is None else hours
        with settled(config, run, kind, row, given, keep) as config:
            KINDS[kind].pretrain(config, run, row, dry_run)
    else:
        KINDS[kind].pretrain(config, run, row, dry_run)
    return Run(run, config.system.device)
