"""``ldae curves``: print the loss and the features of a run while it trained."""

import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from ldae.errors import InputError
from ldae.runs import curves as saved
from ldae.runs.kinds import kind_of
from ldae.runs.metrics import read_records
from ldae.runs.symptoms import RANKME, Record, new_symptoms
from ldae.tree import AnyPath

_ROWS = 16  # of the table, at most
_SETTINGS = 12  # that differ and are listed, at most
_FIRST = ("objective.", "masking.", "noise.", "features.")  # settings that change the task
# Settings that decide what a loss measures.
_OF_THE_LOSS = (
    "objective.target",
    "objective.norm_pix_loss",
    "objective.weight",
    "objective.residual_weight",
)


def curves(
    run: Annotated[AnyPath, tyro.conf.arg(metavar="RUN")], /, beside: str = ""
) -> list[Record]:
    """Print the loss of a run, and RankMe, the spread and the PSNR at three noise levels.

    The values need no labels. A reference run shows what is usual: losses can be compared when
    their data and settings are the same, and those that differ are listed, those of the task first.
    What the run reported about itself, such as a collapse, is repeated at the end.

    Args:
        run: a run folder.
        beside: name of a reference run, whose values after as many images stand beside those of
            the run.

    Returns: all records of the run, the oldest first.

    Raises: InputError when the folder holds no run with metrics, or there is no such reference.

    Examples:
        >>> losses = [record["loss"] for record in ldae.curves("runs/l_dae")]
    """
    run = Path(run).expanduser()
    records = read_records(run)
    if not kind_of(run) or not records:
        raise InputError(f"{run} holds no run with metrics yet")
    reference = saved.read_reference(beside) if beside else None
    print(table(saved.pick(records, _ROWS), beside, reference), end="")
    own = saved.curve_of(run)
    if reference:
        print(f"\n{_comparison(beside, reference, own['settings'], records[-1]['images'])}")
    elif names := saved.references():
        print(f"\nreference runs: {', '.join(names)} (--beside NAME)")
    continued = bool(own["settings"].get("init_from"))
    for count, record in enumerate(records, start=1):
        if RANKME in record:  # only a measurement shows new symptoms
            for sentence in new_symptoms(records[:count], continued):
                print(sentence)
    return records


def table(records: list[Record], beside: str = "", reference: dict[str, Any] | None = None) -> str:
    """Return a line for each record; behind each value, in brackets, that of the reference run."""
    names = [name for name in saved.VALUES if any(name in record for record in records)]
    width = 10 + 11 * bool(reference)
    lines = [f"{'images':>12} {'epoch':>8}" + "".join(f" {name:>{width}}" for name in names)]
    for record in records:
        cells = [_cell(record, name, reference) for name in names]
        line = f"{record['images']:12,} {record.get('epoch', math.nan):8.2f}"
        lines.append(line + "".join(f" {cell:>{width}}" for cell in cells))
    head = [f"in brackets: {beside} after as many images"] if reference else []
    return "\n".join([*head, *lines, ""])


def _cell(record: Record, name: str, reference: dict[str, Any] | None) -> str:
    own = f"{record[name]:.4g}" if name in record else "-"
    if not reference:
        return own
    other = saved.interpolate(reference["records"], name, record["images"])
    return f"{own} ({'-' if other is None else f'{other:.4g}'})"


def _comparison(beside: str, reference: dict[str, Any], own: dict[str, Any], images: int) -> str:
    """Return what to know of a reference beside a run with the settings ``own``, as lines.

    These are the settings that differ, whether the losses are of different kinds, and where the
    reference ends if the run has seen more ``images``.
    """
    theirs = reference["settings"]
    names = sorted(
        {*theirs, *own}, key=lambda name: (not name.startswith(_FIRST), name not in own, name)
    )
    differ = {
        name: f"{name} {theirs.get(name)!r} there, {own.get(name)!r} here"
        for name in names
        if theirs.get(name) != own.get(name)
    }
    listed = [*differ.values()][:_SETTINGS]
    if len(differ) > _SETTINGS:
        listed.append(f"and {len(differ) - _SETTINGS} more")
    settings = (
        f"Settings that differ: {'; '.join(listed)}" if differ else "Its settings are the same."
    )
    lines = [f"{beside} is {reference['row']} on {theirs['data.source']}. {settings}"]
    if of_the_loss := [differ[name] for name in _OF_THE_LOSS if name in differ]:
        lines.append(f"losses cannot be compared: {'; '.join(of_the_loss)}")
    end = reference["records"][-1]["images"]
    if images > end:
        lines.append(f"{beside} ends at {end:,} images")
    return "\n".join(lines)
