"""The command line: a verb, then the arguments of the function behind it."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated

from ldae.errors import InputError
from ldae.train.interrupt import Interrupted

_OF_A_ROW = ("pretrain", "fit-tokenizer")  # verbs that take ROW, --scale, all settings and --run

# Verb -> (the function, what it does). Nothing is imported before its verb is called.
VERBS = {
    "pretrain": (
        "ldae.pretrain:pretrain",
        "pre-train a row of the paper; the same command resumes",
    ),
    "fit-tokenizer": (
        "ldae.fit:fit_tokenizer",
        "fit or train a row's tokenizer by itself; the same command resumes",
    ),
    "knn": ("ldae.evals.knn:knn", "grade a backbone by its nearest neighbours"),
    "linear": ("ldae.evals.linear:linear", "grade a backbone by a linear probe"),
    "fid": ("ldae.evals.fid:fid", "measure how far images are from a reference set"),
    "sample": ("ldae.sample:sample", "sample images from a run: a grid, a folder or a file.npz"),
    "export": ("ldae.export:export", "write a run's backbone as a folder for timm and the hub"),
    "show": ("ldae.cli:show", "the paper's trajectory, or one row's configuration"),
    "diff": ("ldae.cli:diff", "what differs between two rows"),
    "demo": ("ldae.demo:demo", "the whole road in minutes, on built-in data"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 2 for wrong input, or 128 + the signal that stopped it."""
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if verb == "--version":
        from ldae import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, VERBS, n=1, cutoff=0)[0]
        return _refuse(f"there is no command {verb!r}; the nearest is {near!r} (`ldae --help`)")
    try:
        with _stopped_by_sigterm():
            _call(verb, rest)
    except InputError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 141
    except KeyboardInterrupt as stopped:
        print("ldae: stopped", file=sys.stderr)
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
    except Interrupted as stopped:
        print(f"ldae: {stopped}", file=sys.stderr)
        return stopped.exit_status
    return 0


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM, as a scheduler sends it, ends a command as Ctrl-C does: its workers end with it."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<14} {what}" for verb, (_, what) in VERBS.items())
    return (
        "usage: ldae COMMAND ...\n\n"
        "Pre-train image encoders by latent denoising (l-DAE); export them to timm.\n\n"
        f"{verbs}\n\n"
        "`ldae COMMAND --help` lists a command's settings.\n"
        "Start with: ldae demo, or ldae pretrain l_dae --scale small --data DIR --run runs/first"
    )


def _refuse(sentence: str) -> int:
    print(f"ldae: {sentence}", file=sys.stderr)
    return 2


def _call(verb: str, argv: Sequence[str]) -> None:
    import tyro

    if verb in _OF_A_ROW:
        _call_with_row(verb, argv)
        return
    tyro.cli(
        _function(verb), prog=f"ldae {verb}", args=argv, config=(tyro.conf.FlagCreatePairsOff,)
    )


def _function(verb: str) -> Callable:
    module, name = VERBS[verb][0].split(":")
    return getattr(import_module(module), name)


def _call_with_row(verb: str, argv: Sequence[str]) -> None:
    """The settings' defaults are those of the row and the scale, so these two are read first."""
    import tyro

    from ldae import settings, trajectory, tree

    scales = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scales.add_argument("--scale", default="paper")
    chosen, rest = scales.parse_known_args(argv)
    row = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if row is None and not {"-h", "--help"} & set(rest):
        raise InputError(
            f"say which row of the paper: ldae {verb} l_dae ... (`ldae show` lists all)"
        )
    if row and Path(row).suffix in (".yaml", ".yml"):
        base = tree.load(row, trajectory.config("l_dae", chosen.scale))
    else:
        base = trajectory.config(row or "l_dae", chosen.scale)
        row = trajectory.row(row or "l_dae").name

    def call(
        config: Annotated[settings.Config, tyro.conf.arg(name="")] = base,
        *,
        run: Annotated[Path, tyro.conf.arg(help="The run folder, new or to go on with.")],
        dry_run: Annotated[
            bool, tyro.conf.arg(help="Print the configuration and the plan, and stop.")
        ] = False,
    ) -> None:
        _function(verb)(config, run, row, dry_run)

    what = VERBS[verb][1].partition(";")[0]
    tyro.cli(
        call,
        prog=f"ldae {verb} ROW [--scale SCALE]",
        description=(
            f"{what[0].upper()}{what[1:]}: ROW (a name or number of `ldae show`, or a .yaml file of "
            f"settings) at SCALE ({', '.join(trajectory.SCALES)}) in the folder of --run. "
            "The same command again resumes."
        ),
        args=rest,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def show(row: str = "", /, scale: str = "paper") -> None:
    """The trajectory as a table, or one row's full configuration.

    Args:
        row: a row's name or number; empty for the table.
        scale: the scale of the configuration.
    """
    from ldae import trajectory, tree

    if row:
        found = trajectory.row(row)
        place = f"row {found.number}" if found.number else f"beside the rows, from {found.base}"
        print(f"# {place}, {found.name}: {found.summary}")
        print(tree.to_yaml(trajectory.config(row, scale)), end="")
        return
    print("  # row               top-1  FID-50K  what changes")
    for entry in (*trajectory.ROWS, *trajectory.BESIDE):
        accuracy, fid = (
            f"{number:.1f}" if number is not None else "-" for number in (entry.accuracy, entry.fid)
        )
        summary = entry.summary + (f" ({entry.base} changed)" if entry.base else "")
        print(f"{entry.number or '':3} {entry.name:17} {accuracy:>5}  {fid:>7}  {summary}")
    print("\nImageNet, 400 epochs, as published; linear probing of the encoder half.")


def diff(first: str, second: str, /, scale: str = "paper") -> None:
    """The settings that differ between two rows.

    Args:
        first: a row's name or number.
        second: another's.
        scale: the scale of both configurations.
    """
    from ldae import trajectory, tree

    old, new = (trajectory.config(name, scale) for name in (first, second))
    for name, (before, after) in tree.difference(old, new).items():
        print(f"{name:32} {before} -> {after}")
