"""Commands that start a run by a row: ``ldae pretrain ROW --scale SCALE --hours HOURS``."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from ldae.cli.commands import BY_ROW
from ldae.cli.flags import asks_help, named_flags, pop_positional, split_options
from ldae.cli.settings import call_with_settings
from ldae.errors import InputError
from ldae.pretraining import recipes
from ldae.trajectory import DEFAULT, SCALES
from ldae.tree import POSITIVE, flatten, flatten_table, read_yaml


def call_with_row(command: str, argv: Sequence[str], function: Callable) -> None:
    """Read what sets the settings' defaults first: the row, ``--scale`` and ``--init-from``.

    At the scale auto they are those of paper. The command then chooses all that is not named here.
    """
    chosen, rest = split_options(argv, scale="paper")
    row = pop_positional(rest)
    usage, scales = "ROW [--scale SCALE]", ", ".join(SCALES)
    start, auto = "", False
    hours: float | None = None
    if command == "pretrain":
        usage += " [--hours HOURS]"
        scales += "; auto chooses settings by the images, this machine and HOURS, by default 4"
        options, rest = split_options(rest, hours="")
        auto, hours = chosen.scale == "auto", _hours(options.hours, chosen.scale)
        start = vars(split_options(rest, **{"init-from": ""})[0])["init_from"]
    scale, named = "paper" if auto else chosen.scale, {*named_flags(rest)}
    if row is None and not asks_help(rest):
        raise InputError(f"name a row: ldae {command} l_dae ... (`ldae show` lists the rows)")
    if row and Path(row).suffix in (".yaml", ".yml"):
        base = recipes.read(Path(row), scale, BY_ROW[command], start)
        named |= flatten_table(read_yaml(Path(row))).keys()
    else:
        _, row = recipes.find(row or DEFAULT, BY_ROW[command])
        base = recipes.config(row, scale, start)
    if auto:
        keep = tuple(name for name in flatten(base) if name in named)
        function = functools.partial(function, scale="auto", hours=hours, keep=keep)
    call_with_settings(
        command,
        function,
        rest,
        base,
        row,
        usage=usage,
        argument="ROW (a name or number of `ldae show`, or a .yaml file of settings) at SCALE "
        f"({scales})",
    )


def _hours(word: str, scale: str) -> float | None:
    """Return the number of --hours, or None if it is not given.

    Raises: InputError for another word, a number that is no time, and another scale than auto.
    """
    if not word:
        return None
    if scale != "auto":
        raise InputError(f"--hours is for --scale auto, not for the scale {scale}")
    try:
        hours = float(word)
    except ValueError:
        raise InputError(f"--hours takes a number, not {word!r}") from None
    POSITIVE.check("hours", hours)
    return hours
