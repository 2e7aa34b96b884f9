"""The metrics of a training: metrics.jsonl, lines of progress, TensorBoard and W&B."""

import json
import math
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldae.console import format_duration
from ldae.distributed import is_main
from ldae.errors import import_extra
from ldae.files import report_write_errors, write
from ldae.runs import layout
from ldae.tree import flatten_table, read_yaml


class Metrics:
    """The metrics of a run that has seen ``seen`` images. Only rank 0 writes.

    Lines beyond ``seen``, which a killed process wrote after its last checkpoint, are dropped.

    TensorBoard gets a folder in the run folder. W&B gets one run for each run folder, with the
    settings in its config.yaml.

    Raises: InputError when a logger that was asked for is not installed.
    """

    def __init__(self, run: Path, seen: int, tensorboard: bool = False, wandb: str = "") -> None:
        self.file = self.board = self.wandb = None
        if not is_main():
            return
        self.path = run / layout.METRICS
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        kept = [line + "\n" for line in lines if _record(line)["images"] <= seen]
        write(self.path, "".join(kept).encode())
        self.file = open(self.path, "a")
        if tensorboard:
            need = "system.tensorboard needs a package"
            client = import_extra("torch.utils.tensorboard", "tensorboard", need)
            self.board = client.SummaryWriter(run / layout.TENSORBOARD, purge_step=seen)
        if wandb:
            client = import_extra("wandb", "wandb", "system.wandb needs a package")
            self.wandb = client.init(
                project=wandb,
                name=run.name,
                id=_wandb_id(run / layout.WANDB_ID),
                resume="allow",
                config=flatten_table(read_yaml(run / layout.CONFIG)),
                allow_val_change=True,  # some settings may change when a run is resumed
            )

    def write(self, record: dict) -> None:
        """Write a record: ``images``, the number of images seen, and other numbers by name."""
        if self.file is None:
            return
        with report_write_errors(self.path):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        for name, value in record.items():
            if self.board:
                self.board.add_scalar(name, value, record["images"])
        if self.wandb:
            self.wandb.log(record, step=record["images"])

    def close(self) -> None:
        for part in (self.file, self.board):
            if part:
                with suppress(OSError):  # write() has reported a full disk
                    part.close()
        if self.wandb:
            self.wandb.finish()


def read_records(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run, the oldest first, without damaged lines.

    A kill may cut the last line in half. A run without metrics has none.
    """
    path = run / layout.METRICS
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [record for line in lines if math.isfinite((record := _record(line))["images"])]


def _record(line: str) -> dict[str, Any]:
    """Return the record in a line; one after infinitely many images for a damaged line."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and "images" in record and _are_numbers(record.values()):
            return record
    return {"images": math.inf}


def _are_numbers(values: Iterable[Any]) -> bool:
    """Return whether all values are numbers that a float can hold."""
    return all(
        isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64)
        for value in values
    )


def _wandb_id(path: Path) -> str:
    """Return the id of the run at W&B, which is drawn once and kept in the file ``path``."""
    if not path.exists():
        write(path, secrets.token_hex(8).encode())
    return path.read_text()


def progress_line(record: dict, total: int) -> str:
    """Return a record as a line for people."""
    left = (total - record["images"]) / max(record["images_per_second"], 1e-9)
    top1 = f"top-1 {record['top1']:.2f}  " if "top1" in record else ""
    return (
        f"images {record['images']:>10,}/{total:,}  epoch {record['epoch']:.2f}  "
        f"loss {record['loss']:.4f}  {top1}lr {record['lr']:.2e}  "
        f"{record['images_per_second']:,.0f} images/s  waiting for data {record['data_wait']:.0%}  "
        f"left {format_duration(left)}"
    )
