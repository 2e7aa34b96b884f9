"""``ldae pretrain``: pre-train a row of the paper, or a rival such as MAE."""

from pathlib import Path

from ldae import tree
from ldae.pretraining.recipes import name_of
from ldae.run import Run
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.folder import Settings
from ldae.runs.kinds import KINDS, pretrainings, settings_and_folder


def pretrain(
    config: Settings | str | Path,
    run: str | Path | None = None,
    row: str = "",
    dry_run: bool = False,
) -> Run:
    """Pre-train by the settings ``config`` in the folder ``run``, or resume the run there.

    The folder gets config.yaml, environment.json, metrics.jsonl, checkpoints/ and the files of the
    kind of pre-training, such as pictures. A finished run stays as it is. A dry run prints the
    settings and the plan, and writes nothing.

    Args:
        config: the settings, such as ``ldae.config`` returns; or a run folder, and no ``run``, to
            resume it by its own settings.
        run: the run folder, new or to resume.
        row: the name of the recipe in the records; by default the one that the run has there
            already, or else the row whose settings these are.
        dry_run: print the settings and the plan, and stop.

    Returns: the run, opened.

    Raises: InputError for wrong settings or data; Interrupted after a stop signal.

    Examples:
        >>> changes = {"data.source": "photos/", "optim.epochs": 100}
        >>> config = ldae.config("l_dae", scale="small", changes=changes)
        >>> run = ldae.pretrain(config, "runs/photos")
        >>> run = ldae.pretrain("runs/photos")  # resumes, after a kill
    """
    kind, config, run = settings_and_folder(config, run, pretrainings())
    tree.check(config)
    before = Checkpoints(run).describe() or {}
    row = row or before.get("row") or name_of(config, kind)
    KINDS[kind].pretrain(config, run, row, dry_run)
    return Run(run, config.system.device)
