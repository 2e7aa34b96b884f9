"""The command line: a verb, then the arguments of the function behind it."""

import argparse
import functools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated

from ldae.errors import LOST_RANK, InputError, LostRank
from ldae.train.interrupt import SIGNALS, Interrupted

# Verbs that take ROW, --scale, all settings and --run -> the kind of their runs.
_OF_A_ROW = {"pretrain": "pretraining", "fit-tokenizer": "tokenizer"}
_GRADERS = ("knn", "linear", "logreg", "retrieve", "segment", "validate")
_WITHOUT_JOBS = ("jobs", "show", "diff")

# Verb -> (the function, what it does). Nothing is imported before its verb is called.
VERBS = {
    "pretrain": (
        "ldae.commands.pretrain:pretrain",
        "pre-train a row of the paper; the same command resumes",
    ),
    "fit-tokenizer": (
        "ldae.commands.fit_tokenizer:fit_tokenizer",
        "fit or train a row's tokenizer by itself; the same command resumes",
    ),
    "knn": ("ldae.commands.knn:knn", "grade a backbone by its nearest neighbours"),
    "linear": ("ldae.commands.linear:linear", "grade a backbone by a linear probe"),
    "logreg": ("ldae.commands.logreg:logreg", "grade a backbone by logistic regression"),
    "retrieve": (
        "ldae.commands.retrieve:retrieve",
        "grade a backbone by retrieval: mAP and recall",
    ),
    "segment": ("ldae.commands.segment:segment", "grade a backbone's token map: mean IoU"),
    "validate": (
        "ldae.commands.validate:validate",
        "grade a classifier: robustness sets, real labels, corruptions",
    ),
    "evaluate": (
        "ldae.commands.evaluate:evaluate",
        "grade backbones by a suite of protocols and data sets; the same command goes on",
    ),
    "finetune": (
        "ldae.commands.finetune:finetune",
        "fine-tune a backbone by a recipe; the same command resumes",
    ),
    "grid": ("ldae.commands.grid:grid", "probe a run at every t and after every block"),
    "fid": ("ldae.commands.fid:fid", "measure how far images are from a reference set"),
    "sample": (
        "ldae.commands.sample:sample",
        "sample images from a run: a grid, a folder or a file.npz",
    ),
    "export": (
        "ldae.commands.export:export",
        "write a run's backbone as a folder for timm and the hub",
    ),
    "submit": (
        "ldae.commands.submit:submit",
        "send a pre-training and what follows it to a cluster",
    ),
    "jobs": ("ldae.commands.jobs:jobs", "what runs, waits and failed of the jobs that were sent"),
    "show": ("ldae.commands.show:show", "the paper's trajectory, or one row's configuration"),
    "diff": ("ldae.commands.diff:diff", "what differs between two rows"),
    "demo": ("ldae.commands.demo:demo", "the whole road in minutes, on built-in data"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    The exit status is 0, 2 for wrong input, ``LOST_RANK`` for a lost process of the same run, or 128
    + the signal that stopped it.
    """
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if verb == "--version":
        from ldae import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        near = _nearest(verb)
        return _refuse(f"there is no command {verb!r}; the nearest is {near!r} (`ldae --help`)")
    try:
        with _stopped_by_schedulers():
            _run(verb, rest)
    except LostRank as error:
        _refuse(str(error))
        return LOST_RANK
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
def _stopped_by_schedulers() -> Iterator[None]:
    """What a scheduler sends ends a command as Ctrl-C does: its workers end with it."""
    asked = set(SIGNALS) - {signal.SIGINT}

    def stop(number: int, frame: object) -> None:
        for again in asked:  # it comes more than once, and would break into the end of the command
            signal.signal(again, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    previous = {number: signal.signal(number, stop) for number in asked}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(verb: str, argv: Sequence[str]) -> None:
    """Call the function of a verb here, or send the command to where its flags of --slurm say."""
    from ldae.cluster.send import log_path, send
    from ldae.cluster.settings import FLAG, folder_of, parse_flags, split_flags

    own, flags = split_flags(argv)
    if _asks_help(own) and verb not in _WITHOUT_JOBS:
        try:
            _call(verb, own)
        finally:
            parse_flags(["--help"], prog=f"ldae {verb} ...")
    elif verb == "submit":
        _call(verb, own, functools.partial(_function(verb), flags=flags))
    elif flags:
        if verb in _WITHOUT_JOBS:
            raise InputError(f"`ldae {verb}` answers at once, here; it takes no {FLAG}")
        settings = parse_flags(flags, prog=f"ldae {verb} ...")
        parse(verb, own)  # what it refuses is told now, and not by a job that has waited for hours
        (job,) = send([[verb, *own]], settings, folder_of(settings, own))
        print(f"job {job.job_id}: ldae {verb}; its log is {log_path(job)}", flush=True)
        if settings.cluster == "debug":
            job.results()
    else:
        _call(verb, own)


def parse(verb: str, argv: Sequence[str]) -> None:
    """Check a command line without running it.

    Raises: InputError and SystemExit as the command itself would for what its parser refuses.
    """
    if verb not in VERBS:
        raise InputError(f"there is no command {verb!r}; the nearest is {_nearest(verb)!r}")

    if verb == "finetune":  # whose backbone would be opened for its size, and may not be there yet
        argv = ["--size", "B", *argv]

    @functools.wraps(_function(verb))
    def nothing(*args: object, **kwargs: object) -> None: ...

    _call(verb, argv, nothing)


def _nearest(verb: str) -> str:
    from difflib import get_close_matches

    return get_close_matches(verb, VERBS, n=1, cutoff=0)[0]


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<14} {what}" for verb, (_, what) in VERBS.items())
    return (
        "usage: ldae COMMAND ...\n\n"
        "Pre-train image encoders by latent denoising (l-DAE); export them to timm.\n\n"
        f"{verbs}\n\n"
        "`ldae COMMAND --help` lists a command's settings; `ldae COMMAND ... --slurm` sends it to a "
        "cluster.\n"
        "Start with: ldae demo, or ldae pretrain l_dae --scale small --data DIR --run runs/first"
    )


def _refuse(sentence: str) -> int:
    print(f"ldae: {sentence}", file=sys.stderr)
    return 2


def _call(verb: str, argv: Sequence[str], function: Callable | None = None) -> None:
    """Call a verb's function, or another of its signature, with a command line's arguments."""
    import tyro

    function = function or _function(verb)
    if verb in _OF_A_ROW:
        _call_with_row(verb, argv, function)
    elif verb == "finetune":
        _call_with_recipe(verb, argv, function)
    else:
        tyro.cli(function, prog=f"ldae {verb}", args=argv, config=(tyro.conf.FlagCreatePairsOff,))


def _function(verb: str) -> Callable:
    module, name = VERBS[verb][0].split(":")
    return getattr(import_module(module), name)


def graders() -> dict[str, Callable[..., dict]]:
    """The commands that grade a backbone or a classifier on a data set, which a suite may name."""
    return {verb: _function(verb) for verb in _GRADERS}


def _call_with_row(verb: str, argv: Sequence[str], function: Callable) -> None:
    """The settings' defaults are those of the row and the scale, so these two are read first."""
    from ldae import trajectory
    from ldae.runs import kinds

    chosen, row, rest = _read_first(argv, scale="paper")
    if row is None and not _asks_help(rest):
        raise InputError(
            f"say which row of the paper: ldae {verb} l_dae ... (`ldae show` lists all)"
        )
    if row and Path(row).suffix in (".yaml", ".yml"):
        base = kinds.load(Path(row), _OF_A_ROW[verb], trajectory.config("l_dae", chosen.scale))
    else:
        base = trajectory.config(row or "l_dae", chosen.scale)
        row = trajectory.row(row or "l_dae").name
    _call_with_settings(
        verb,
        function,
        rest,
        base,
        row,
        usage="ROW [--scale SCALE]",
        what="ROW (a name or number of `ldae show`, or a .yaml file of settings) at SCALE "
        f"({', '.join(trajectory.SCALES)})",
    )


def _call_with_recipe(verb: str, argv: Sequence[str], function: Callable) -> None:
    """The settings' defaults are those of the recipe for the size of the backbone."""
    from ldae.finetuning import recipes
    from ldae.tree import replace

    chosen, backbone, rest = _read_first(argv, recipe="", size="")
    names = ", ".join(found.name for found in recipes.RECIPES)
    if _asks_help(rest):
        base = recipes.config(chosen.recipe or "mae", chosen.size or "B")
    elif backbone is None or not chosen.recipe:
        raise InputError(f"say what and how: ldae {verb} BACKBONE --recipe NAME ... ({names})")
    else:
        recipes.recipe(chosen.recipe)  # told before anything is opened
        size = chosen.size or recipes.default_size(backbone)
        base = replace(recipes.config(chosen.recipe, size), {"backbone": backbone})
    _call_with_settings(
        verb,
        function,
        rest,
        base,
        usage="BACKBONE --recipe NAME [--size SIZE]",
        what="BACKBONE (a run folder, an exported folder, a timm name or NAME@FILE) by the recipe "
        f"NAME ({names}) with its constants for SIZE (B, L or H; by default by the backbone's width)",
    )


def _read_first(
    argv: Sequence[str], **options: str
) -> tuple[argparse.Namespace, str | None, list[str]]:
    """What the defaults of the settings depend on: options, a positional argument; and the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in options.items():
        parser.add_argument(f"--{name}", default=default)
    chosen, rest = parser.parse_known_args(argv)
    first = rest.pop(0) if rest and not rest[0].startswith("-") else None
    return chosen, first, rest


def _asks_help(argv: Sequence[str]) -> bool:
    return bool({"-h", "--help"} & set(argv))


def _call_with_settings(
    verb: str,
    function: Callable,
    argv: Sequence[str],
    base: object,
    *more: object,
    usage: str,
    what: str,
) -> None:
    """Call the ``function`` of ``verb`` with ``base`` changed by the command line, and ``more``."""
    import tyro

    def call(
        config: Annotated[type(base), tyro.conf.arg(name="")] = base,
        *,
        run: Annotated[Path, tyro.conf.arg(help="The run folder, new or to go on with.")],
        dry_run: Annotated[
            bool, tyro.conf.arg(help="Print the configuration and the plan, and stop.")
        ] = False,
    ) -> None:
        function(config, run, *more, dry_run)

    does = VERBS[verb][1].partition(";")[0]
    tyro.cli(
        call,
        prog=f"ldae {verb} {usage}",
        description=(
            f"{does[0].upper()}{does[1:]}: {what} in the folder of --run. "
            "The same command again resumes."
        ),
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed),
    )
