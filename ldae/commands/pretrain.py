"""``ldae pretrain``: pre-train a row of the paper, or a rival such as MAE."""

from pathlib import Path
from typing import Any

from ldae.runs.kinds import kind_with


def pretrain(config: Any, run: Path, row: str, dry_run: bool = False) -> None:
    """Pre-train by the settings ``config`` in the folder ``run``, or resume the run there.

    The folder gets config.yaml, environment.json, metrics.jsonl, checkpoints/ and the files of the
    kind of pre-training, such as pictures. A finished run stays as it is. A dry run prints the
    settings and the plan, and writes nothing. ``row`` is the name of the recipe in the records.

    Raises: InputError for wrong settings or data; Interrupted after a stop signal.
    """
    kind_with(config).pretrain(config, Path(run), row, dry_run)
