"""Curves of runs: a run's own, and those of reference runs that come with the package."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ldae
from ldae import tree
from ldae.errors import unknown
from ldae.runs import layout
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.metrics import read_records
from ldae.runs.symptoms import LEVELS, RANKME, SPREAD, Record, psnr_key

FOLDER = Path(ldae.__file__).parent / "reference_curves"
VALUES = ("loss", RANKME, SPREAD, *map(psnr_key, LEVELS))
_POINTS = 64  # records of a reference curve


def references() -> list[str]:
    """Return the names of the reference curves."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_reference(name: str) -> dict[str, Any]:
    """Return the reference curve ``name``, see ``curve_of``.

    Raises: InputError with the nearest name when there is none.
    """
    if name not in references():
        raise unknown("there is no reference curve", name, references())
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def curve_of(run: Path) -> dict[str, Any]:
    """Return the curve of a run: its recipe, its settings by dotted name, and its records.

    Of each record, the images seen, the epoch and ``VALUES`` are kept; of many records, 64.
    """
    settings = tree.flatten_table(tree.read_yaml(run / layout.CONFIG))
    kept = {name: value for name, value in settings.items() if not name.startswith("system.")}
    records = [_point(record) for record in pick(read_records(run), _POINTS)]
    described = Checkpoints(run).describe() or {}
    return {"row": described.get("row", ""), "settings": kept, "records": records}


def pick(records: Sequence[Record], count: int) -> list[Record]:
    """Return at most ``count`` records at equal distances, with the last one.

    Records in which the features were measured are preferred, if there are enough of them.
    """
    watched = [record for record in records if RANKME in record]
    enough = watched and len(watched) >= min(count, len(records) // 2)
    chosen = watched if enough else list(records)
    places = np.linspace(0, len(chosen) - 1, min(count, len(chosen)))
    return [chosen[place] for place in places.round().astype(int)]


def interpolate(records: Sequence[Record], name: str, images: float) -> float | None:
    """Return a value of a curve after a number of images, or None outside of the curve."""
    known = [record for record in records if name in record]
    seen = [record["images"] for record in known]
    if not seen or not seen[0] <= images <= seen[-1]:
        return None
    return float(np.interp(images, seen, [record[name] for record in known]))


def _point(record: Record) -> Record:
    rounded = {name: float(f"{record[name]:.5g}") for name in VALUES if name in record}
    return {"images": record["images"], "epoch": record.get("epoch")} | rounded
