"""The command line: a verb, then the arguments of the function behind it."""

import argparse
import functools
import inspect
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_type_hints

from ldae.errors import InputError, exit_status, report, unknown
from ldae.train.interrupt import SIGNALS, Interrupted

if TYPE_CHECKING:
    from ldae.evals.protocol import Grader

# Verbs that take ROW, --scale, all settings and --run -> the kind of their runs.
_OF_A_ROW = {"pretrain": "pretraining", "fit-tokenizer": "tokenizer"}
_WITHOUT_JOBS = ("jobs", "show", "diff")
_NOT_IN_HELP = ("Args:", "Returns:", "Raises:")  # parts of a docstring

# What each command does. A command is the function of its name in the file of its name, and nothing
# is imported before it is called.
GRADERS = {
    "knn": "grade a backbone by its nearest neighbours",
    "linear": "grade a backbone by a linear probe",
    "logreg": "grade a backbone by logistic regression",
    "retrieve": "grade a backbone by retrieval: mAP and recall",
    "segment": "grade a backbone's token map: mean IoU",
    "validate": "measure a classifier's accuracy: robustness sets, real labels, corruptions",
}
"""The commands with a protocol, which a suite may name too."""
VERBS = {
    "pretrain": "pre-train a row of the paper; the same command resumes",
    "fit-tokenizer": "fit or train a row's tokenizer by itself; the same command resumes",
    **GRADERS,
    "evaluate": "run a suite of these for many backbones into one table; the same command goes on",
    "finetune": "fine-tune a backbone by a recipe; the same command resumes",
    "grid": "probe a run at every t and after every block",
    "fid": "measure how far images are from a reference set",
    "sample": "sample images from a run: a grid, a folder or a file.npz",
    "export": "write a run's backbone as a folder for timm and the hub",
    "submit": "send a pre-training and what follows it to a cluster",
    "jobs": "list the jobs that run, wait and failed",
    "show": "show the paper's trajectory, or one row's configuration",
    "diff": "show what differs between two rows",
    "demo": "run everything in minutes, on built-in data",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns: the exit status, which is 0, 2 for wrong input, ``LOST_RANK`` for a lost rank, or 128 +
        the number of the signal that stopped the command.
    """
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if verb == "--version":
        from ldae import __version__

        print(__version__)
        return 0
    try:
        _check_verb(verb)
        with _stopped_by_schedulers():
            _run(verb, rest)
    except (InputError, Interrupted) as error:
        report(error)
        return error.exit_status
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 141
    except KeyboardInterrupt as stopped:
        print("ldae: stopped", file=sys.stderr)
        return exit_status(stopped)
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

    Raises: InputError and SystemExit as the command itself would, for what its parser refuses and
        for a setting with a value that it does not take.
    """
    from dataclasses import is_dataclass

    from ldae.tree import check

    _check_verb(verb)
    if verb == "finetune":  # whose backbone would be opened for its size, and may not be there yet
        argv = ["--size", "B", *argv]

    @functools.wraps(_function(verb))
    def check_settings(*args: object, **kwargs: object) -> None:
        for settings in filter(is_dataclass, (*args, *kwargs.values())):
            check(settings)

    _call(verb, argv, check_settings)


def _check_verb(verb: str) -> None:
    """Check that there is such a command. Raises: InputError that names the nearest one."""
    if verb not in VERBS:
        raise unknown("there is no command", verb, VERBS, " (`ldae --help`)")


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<14} {what}" for verb, what in VERBS.items())
    return (
        "usage: ldae COMMAND ...\n\n"
        "Pre-train image encoders by latent denoising (l-DAE); export them to timm.\n\n"
        f"{verbs}\n\n"
        "`ldae COMMAND --help` lists a command's settings; `ldae COMMAND ... --slurm` sends it to a "
        "cluster.\n"
        "Start with: ldae demo, or ldae pretrain l_dae --scale small --data DIR --run runs/first"
    )


def _call(verb: str, argv: Sequence[str], function: Callable | None = None) -> None:
    """Call a verb's function, or another of its signature, with a command line's arguments."""
    function = function or _function(verb)
    if verb in _OF_A_ROW:
        _call_with_row(verb, argv, function)
    elif verb == "finetune":
        _call_with_recipe(verb, argv, function)
    elif verb in GRADERS:
        _call_with_protocol(verb, argv, function)
    else:
        _parse(verb, argv, function)


def _parse(
    prog: str,
    argv: Sequence[str],
    function: Callable,
    description: str | None = None,
    prefixes: bool = False,
) -> None:
    """Call a function with the arguments of a command line.

    ``prefixes``: the fields of a settings class are flags under its name and a dot.
    """
    import tyro

    config = [tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed]
    config += [] if prefixes else [tyro.conf.OmitArgPrefixes]
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    does = [" ".join(part.split()) for part in paragraphs if not part.startswith(_NOT_IN_HELP)]
    tyro.cli(
        function,
        prog=f"ldae {prog}",
        args=argv,
        description=description or "\n\n".join(does),
        config=config,
    )


def _function(verb: str) -> Callable:
    name = verb.replace("-", "_")
    return getattr(import_module(f"ldae.commands.{name}"), name)


def graders() -> dict[str, "Grader"]:
    """Return the commands with a protocol by name, for suites and for Python."""
    from ldae.evals.protocol import Grader

    return {verb: Grader(verb, _function(verb)) for verb in GRADERS}


def _call_with_protocol(verb: str, argv: Sequence[str], function: Callable) -> None:
    """The fields of the protocol are flags, so ``--protocol`` is read first where there are several."""
    import tyro

    from ldae.evals.protocol import Grader

    grader = Grader(verb, function)
    kinds = grader.protocols
    named = _read_options(argv, protocol="")[0].protocol if len(kinds) > 1 else ""
    flags = (word[2:].partition("=")[0] for word in argv if word.startswith("--"))
    kind = grader.choose(named, (flag.replace("-", "_") for flag in flags))

    def call(*args: object, name: str = kind.name, **kwargs: object) -> None:
        function(*args, **kwargs)

    # The protocol has no default here, so that it knows what was given and what was not.
    parameters = dict(inspect.signature(function).parameters)
    parameters["protocol"] = parameters["protocol"].replace(default=inspect.Parameter.empty)
    types = get_type_hints(function, include_extras=True) | {"protocol": kind}
    if len(kinds) > 1:
        parameters["name"] = inspect.signature(call).parameters["name"]
        does = "; ".join(
            f"{name}: {part.__doc__.splitlines()[0][:-1]}" for name, part in kinds.items()
        )
        option = tyro.conf.arg(name="protocol", help=f"{does}. With --help: lists its settings.")
        types["name"] = Annotated[Literal[tuple(kinds)], option]
    call.__doc__, call.__annotations__ = function.__doc__, types
    call.__signature__ = inspect.Signature(list(parameters.values()))
    _parse(verb, argv, call)


def _call_with_row(verb: str, argv: Sequence[str], function: Callable) -> None:
    """The settings' defaults are those of the row and the scale, so these two are read first."""
    from ldae import trajectory
    from ldae.runs import kinds

    chosen, rest = _read_options(argv, scale="paper")
    row = _pop_positional(rest)
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

    chosen, rest = _read_options(argv, recipe="", size="")
    backbone = _pop_positional(rest)
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


def _read_options(argv: Sequence[str], **options: str) -> tuple[argparse.Namespace, list[str]]:
    """Return the options on which the defaults of the settings depend, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in options.items():
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_known_args(argv)


def _pop_positional(words: list[str]) -> str | None:
    return words.pop(0) if words and not words[0].startswith("-") else None


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

    does = VERBS[verb].partition(";")[0]
    description = f"{does[0].upper()}{does[1:]}: {what} in the folder of --run. "
    description += "The same command again resumes."
    _parse(f"{verb} {usage}", argv, call, description, prefixes=True)
