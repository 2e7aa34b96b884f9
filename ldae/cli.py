"""The command line: the name of a command, and the arguments of its function."""

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

from ldae import launch
from ldae.errors import InputError, exit_status, report, unknown
from ldae.train.interrupt import SIGNALS, Interrupted

if TYPE_CHECKING:
    from ldae.cluster.settings import SlurmSettings
    from ldae.evals.protocol import Grader

# Commands that take a recipe by name -> the kinds of run that they start; empty: all pre-trainings.
_STARTS: dict[str, tuple[str, ...]] = {"pretrain": (), "fit-tokenizer": ("tokenizer",)}
# Commands that take a backbone by a recipe -> the module of the recipes.
_RECIPES = {"finetune": "ldae.finetuning.recipes", "detect": "ldae.detection.recipes"}
_WITHOUT_JOBS = ("jobs", "curves", "show", "diff")
_RELIST = "--relist"
_NOT_IN_HELP = ("Args:", "Returns:", "Raises:", "Examples:")  # sections of a docstring

# The function of a command has the command's name and lies in the file of that name. The file is
# imported when the command is called.
GRADERS = {
    "knn": "grade a backbone: accuracy of nearest neighbours",
    "linear": "grade a backbone: accuracy of a linear probe",
    "logreg": "grade a backbone: accuracy of logistic regression, also few-shot",
    "retrieve": "grade a backbone: mAP and recall of image retrieval",
    "segment": "grade a backbone: mean IoU of semantic segmentation",
    "validate": "grade a finished classifier: accuracy, also on robustness sets, or corrupted",
}
"""The commands with a protocol, which may be part of a suite."""
COMMANDS = {
    "pretrain": "pre-train a row of the paper, or a rival (mae); the same command resumes",
    "fit-tokenizer": "fit or train only the tokenizer of a row; the same command resumes",
    "finetune": "fine-tune a backbone by a recipe; the same command resumes",
    "detect": "train and grade an object detector on a backbone; the same command resumes",
    **GRADERS,
    "evaluate": "run many gradings of a suite file into one table; resumes too",
    "rerun": "repeat an evaluation, and say whether its numbers are the same",
    "grid": "probe the encoder of a run at many noise levels and after every block",
    "fid": "measure the FID of generated images to reference images",
    "sample": "generate images from a run: a grid, a folder or a file.npz",
    "embed": "write the features of a backbone as .npy or .parquet; resumes too",
    "cache": "decode images once, into one file that any command reads fast; resumes too",
    "export": "write a backbone or classifier for timm and the hub, and as ONNX",
    "submit": "send a pre-training and the jobs that follow it to a cluster",
    "jobs": "list the running, waiting and failed jobs",
    "curves": "print the loss and the features of a run, beside a reference run",
    "show": "show the rows of the paper and their rivals, or the settings of one",
    "diff": "show the settings that differ between two rows",
    "doctor": "measure this machine: what bounds a pre-training, and how long ImageNet takes",
    "demo": "run everything in minutes, on built-in images",
}
_IN_RANKS = (
    *_STARTS, *_RECIPES, *GRADERS, "evaluate", "rerun", "grid", "fid", "sample", "embed"
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns: the exit status, which is 0, 2 for wrong input, ``LOST_RANK`` for a lost rank, or 128 +
        the number of the signal that stopped the command.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if command == "--version":
        from ldae import __version__

        print(__version__)
        return 0
    try:
        _check_command(command)
        with _stopped_by_schedulers():
            launch.stop_with_launcher()
            return _run(command, rest)
    except (InputError, Interrupted) as error:
        report(error)
        return error.exit_status
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 141
    except KeyboardInterrupt as stopped:
        print("ldae: stopped", file=sys.stderr)
        return exit_status(stopped)


@contextmanager
def _stopped_by_schedulers() -> Iterator[None]:
    """End the command after a signal of a scheduler as after Ctrl-C, together with its workers."""
    signals = set(SIGNALS) - {signal.SIGINT}

    def stop(number: int, frame: object) -> None:
        for other in signals:  # a scheduler repeats its signals, which would interrupt the cleanup
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    previous = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(command: str, argv: Sequence[str]) -> int:
    """Run a command here, in several ranks (--devices), or on a cluster (flags of --slurm).

    Returns: the exit status.
    """
    from ldae.cluster.send import log_path, send
    from ldae.cluster.settings import FLAG, folder_of, parse_flags, set_tasks, split_flags

    argv, flags = split_flags(argv)
    argv, devices = launch.split_devices(argv)
    if devices and command not in _IN_RANKS:
        raise InputError(f"`ldae {command}` takes no {launch.FLAG}: it runs in one process")
    if _asks_help(argv) and command not in _WITHOUT_JOBS:
        try:
            _call(command, argv)
        finally:
            if command in _IN_RANKS:
                print(f"\n{launch.HELP}\n")
            parse_flags(["--help"], prog=f"ldae {command} ...")
    elif command == "submit":
        _call(command, argv, functools.partial(function_of(command), flags=flags))
    elif flags:
        if command in _WITHOUT_JOBS:
            raise InputError(f"`ldae {command}` takes no {FLAG}: it is done in a moment")
        settings = set_tasks(parse_flags(flags, prog=f"ldae {command} ..."), devices)
        if command == "evaluate":
            _send_cells(argv, settings)
            return 0
        parse(command, argv)  # refuse wrong arguments before the job waits for hours
        (job,) = send([[command, *argv]], settings, folder_of(settings, argv))
        print(f"job {job.job_id}: ldae {command}; its log is {log_path(job)}", flush=True)
        if settings.cluster == "debug":
            job.results()
    elif devices:
        launch.check_unlaunched(devices)
        if devices > 1:
            return launch.launch([command, *argv], devices)
        _call(command, argv)
    else:
        _call(command, argv)
    return 0


def _send_cells(argv: Sequence[str], settings: "SlurmSettings") -> None:
    """Send the cells of a suite as an array of jobs."""
    module = import_module(function_of("evaluate").__module__)

    @functools.wraps(module.evaluate)
    def send(*args: object, **kwargs: object) -> None:
        module.send_cells(settings, *args, **kwargs)

    _call("evaluate", argv, send)


def parse(command: str, argv: Sequence[str]) -> None:
    """Check the arguments of a command without running it.

    Raises: InputError and SystemExit, as the command, for wrong arguments and values of settings;
        InputError for --devices, since a job has other settings for its ranks.
    """
    from dataclasses import is_dataclass

    from ldae.tree import check

    _check_command(command)
    if launch.split_devices(argv)[1]:
        raise InputError(f"a job has slurm.tasks_per_node ranks on each machine, not {launch.FLAG}")
    if command in _RECIPES:  # with a size, the backbone is not opened, which may not exist yet
        argv = ["--size", "B", *argv]

    @functools.wraps(function_of(command))
    def check_settings(*args: object, **kwargs: object) -> None:
        for settings in filter(is_dataclass, (*args, *kwargs.values())):
            check(settings)

    _call(command, argv, check_settings)


def _check_command(command: str) -> None:
    """Check that there is such a command. Raises: InputError that names the nearest one."""
    if command not in COMMANDS:
        raise unknown("there is no command", command, COMMANDS, " (`ldae --help`)")


def _usage() -> str:
    commands = "\n".join(f"  {name:<14} {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: ldae COMMAND ...\n\n"
        "Pre-train image encoders by latent denoising (l-DAE); export them to timm.\n\n"
        f"{commands}\n\n"
        "`ldae COMMAND --help` lists a command's settings; `ldae COMMAND ... --slurm` sends it "
        "to a cluster.\n"
        f"{launch.HELP}\n"
        f"`ldae COMMAND ... {_RELIST}` lists the files of large data sets anew.\n"
        "Start with: ldae demo, or ldae pretrain l_dae --scale auto --data DIR --run runs/first"
    )


def _call(command: str, argv: Sequence[str], function: Callable | None = None) -> None:
    """Call a command's function, or ``function`` in its place, with command line arguments."""
    if _RELIST in argv and command not in (*_WITHOUT_JOBS, "submit"):
        from ldae.data.listing import relisting

        with relisting():
            return _call(command, [word for word in argv if word != _RELIST], function)
    function = function or function_of(command)
    if command in _STARTS:
        _call_with_row(command, argv, function)
    elif command in _RECIPES:
        _call_with_recipe(command, argv, function)
    elif command in GRADERS:
        _call_with_protocol(command, argv, function)
    else:
        _parse(command, argv, function)


def _parse(
    prog: str,
    argv: Sequence[str],
    function: Callable,
    description: str | None = None,
    prefixes: bool = False,
) -> None:
    """Call a function with command line arguments.

    With ``prefixes``, the flag of a setting is its dotted name; otherwise its last part.
    """
    import tyro

    config = [tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed]
    config += [] if prefixes else [tyro.conf.OmitArgPrefixes]
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    paragraphs = [" ".join(p.split()) for p in paragraphs if not p.startswith(_NOT_IN_HELP)]
    tyro.cli(
        function,
        prog=f"ldae {prog}",
        args=argv,
        description=description or "\n\n".join(paragraphs),
        config=config,
    )


def function_of(command: str) -> Callable:
    """Return the function of a command."""
    name = command.replace("-", "_")
    return getattr(import_module(f"ldae.commands.{name}"), name)


def graders() -> dict[str, "Grader"]:
    """Return the commands with a protocol by name."""
    from ldae.evals.protocol import Grader

    return {name: Grader(name, function_of(name)) for name in GRADERS}


def _call_with_protocol(command: str, argv: Sequence[str], function: Callable) -> None:
    """Read ``--protocol`` first where there are several, as its fields become flags."""
    import tyro

    from ldae.evals.protocol import Grader

    grader = Grader(command, function)
    kinds = grader.protocols
    named = _read_options(argv, protocol="")[0].protocol if len(kinds) > 1 else ""
    words = (word.partition("=")[0] for word in argv if word.startswith("--"))
    kind = grader.choose(named, (word[2:].replace("-", "_") for word in words))

    def call(*args: object, name: str = named or next(iter(kinds)), **kwargs: object) -> None:
        function(*args, **kwargs)

    # Without a default, so that the protocol itself sets the fields that are not given.
    parameters = dict(inspect.signature(function).parameters)
    parameters["protocol"] = parameters["protocol"].replace(default=inspect.Parameter.empty)
    types = get_type_hints(function, include_extras=True) | {"protocol": kind}
    if len(kinds) > 1:
        parameters["name"] = inspect.signature(call).parameters["name"]
        summary = "; ".join(
            f"{name}: {str(part.__doc__).splitlines()[0][:-1]}" for name, part in kinds.items()
        )
        option = tyro.conf.arg(name="protocol", help=f"{summary}. With --help: lists its settings.")
        types["name"] = Annotated[Literal[tuple(kinds)], option]
    call.__doc__, call.__annotations__ = function.__doc__, types
    signature = inspect.Signature(list(parameters.values()))
    call.__signature__ = signature  # type: ignore[attr-defined]  # for inspect
    _parse(command, argv, call)


def _call_with_row(command: str, argv: Sequence[str], function: Callable) -> None:
    """Read what sets the settings' defaults first: the row, ``--scale`` and ``--init-from``.

    At the scale auto they are those of paper. The command then chooses all that is not named here.
    """
    from ldae import trajectory, tree
    from ldae.pretraining import recipes

    chosen, rest = _read_options(argv, scale="paper")
    row = _pop_positional(rest)
    usage, scales = "ROW [--scale SCALE]", ", ".join(trajectory.SCALES)
    start, auto = "", False
    hours: float | None = None
    if command == "pretrain":
        usage += " [--hours HOURS]"
        scales += "; auto chooses settings by the images, this machine and HOURS, by default 4"
        options, rest = _read_options(rest, hours="")
        auto, hours = chosen.scale == "auto", _hours(options.hours, chosen.scale)
        start = vars(_read_options(rest, **{"init-from": ""})[0])["init_from"]
    scale, named = "paper" if auto else chosen.scale, _named_settings(rest)
    if row is None and not _asks_help(rest):
        raise InputError(f"name a row: ldae {command} l_dae ... (`ldae show` lists the rows)")
    if row and Path(row).suffix in (".yaml", ".yml"):
        base = recipes.read(Path(row), scale, _STARTS[command], start)
        named |= tree.flatten_table(tree.read_yaml(Path(row))).keys()
    else:
        _, row = recipes.find(row or "l_dae", _STARTS[command])
        base = recipes.config(row, scale, start)
    if auto:
        keep = tuple(name for name in tree.flatten(base) if name in named)
        function = functools.partial(function, scale="auto", hours=hours, keep=keep)
    _call_with_settings(
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
    from ldae.tree import POSITIVE

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


def _named_settings(argv: Sequence[str]) -> set[str]:
    """Return the dotted names in the flags of a command line."""
    flags = (word[2:].partition("=")[0] for word in argv if word.startswith("--"))
    return {flag.replace("-", "_") for flag in flags}


def _call_with_recipe(command: str, argv: Sequence[str], function: Callable) -> None:
    """Read what sets the defaults first: backbone, recipe, its version in the run, and size."""
    from ldae.tree import taken_by

    recipes = import_module(_RECIPES[command])
    chosen, rest = _read_options(argv, recipe=recipes.DEFAULT, size="")
    backbone = _pop_positional(rest)
    names = ", ".join(recipes.RECIPES)
    recipe = "[--recipe NAME]" if recipes.DEFAULT else "--recipe NAME"
    if _asks_help(rest):
        base = recipes.config(chosen.recipe or next(iter(recipes.RECIPES)), chosen.size or "B")
    elif backbone is None or not chosen.recipe:
        raise InputError(
            f"name a backbone and a recipe: ldae {command} BACKBONE {recipe} ... ({names})"
        )
    else:
        make = getattr(recipes, f"{command}_config")
        known = {"size": chosen.size, "run": _read_options(rest, run="")[0].run}
        base = make(backbone, chosen.recipe, **taken_by(make, known))
    _call_with_settings(
        command,
        function,
        rest,
        base,
        usage=f"BACKBONE {recipe} [--size SIZE]",
        argument="BACKBONE (a run folder, an exported folder, a timm name or NAME@FILE) by the "
        f"recipe NAME ({names}) for SIZE (B, L or H; by default from the backbone's width)",
    )


def _read_options(argv: Sequence[str], **options: str) -> tuple[argparse.Namespace, list[str]]:
    """Return these options and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in options.items():
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_known_args(argv)


def _pop_positional(words: list[str]) -> str | None:
    return words.pop(0) if words and not words[0].startswith("-") else None


def _asks_help(argv: Sequence[str]) -> bool:
    return bool({"-h", "--help"} & set(argv))


def _call_with_settings(
    command: str,
    function: Callable,
    argv: Sequence[str],
    base: object,
    *more: object,
    usage: str,
    argument: str,
) -> None:
    """Call ``function`` with ``base`` changed by command line arguments, ``--run`` and ``more``.

    ``argument`` describes the positional argument in the help.
    """
    import tyro

    def call(
        # The flags are the fields of this class, which is known only here.
        config: Annotated[type(base), tyro.conf.arg(name="")] = base,  # type: ignore[valid-type]
        *,
        run: Annotated[Path, tyro.conf.arg(help="The run folder, new or to resume.")],
        dry_run: Annotated[
            bool, tyro.conf.arg(help="Print the settings and the plan, and stop.")
        ] = False,
        seeds: Annotated[
            tuple[int, ...],
            tyro.conf.arg(help="Seeds to train by, each in a folder of its own below --run."),
        ] = (),
    ) -> None:
        function(config, run, *more, dry_run, **({"seeds": seeds} if seeds else {}))

    if "seeds" not in inspect.signature(function).parameters:
        parameters = inspect.signature(call).parameters.values()
        kept = [parameter for parameter in parameters if parameter.name != "seeds"]
        call.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]  # for inspect

    summary = COMMANDS[command].partition(";")[0]
    description = f"{summary.capitalize()}: {argument} in the folder of --run. "
    description += "The same command again resumes."
    _parse(f"{command} {usage}", argv, call, description, prefixes=True)
