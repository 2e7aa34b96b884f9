"""Where a command runs: in this process, in several ranks, or on a cluster."""

import functools
from collections.abc import Sequence
from importlib import import_module

from ldae import launch
from ldae.cli.arguments import call, check_arguments
from ldae.cli.commands import IN_RANKS, WITHOUT_JOBS, check_command, function_of
from ldae.cli.flags import asks_help
from ldae.cluster.array import send_array
from ldae.cluster.settings import (
    FLAG,
    SlurmSettings,
    folder_of,
    parse_flags,
    set_tasks,
    split_flags,
)
from ldae.errors import InputError


def dispatch(command: str, argv: Sequence[str]) -> int:
    """Run a command here, in several ranks (--devices), or on a cluster (flags of --slurm).

    Returns: the exit status.

    Raises: InputError for an unknown command, and as the command.
    """
    check_command(command)
    argv, flags = split_flags(argv)
    argv, devices = launch.split_devices(argv)
    if devices and command not in IN_RANKS:
        raise InputError(f"`ldae {command}` takes no {launch.FLAG}: it runs in one process")
    if asks_help(argv) and command not in WITHOUT_JOBS:
        _print_help(command, argv)
    elif command == "submit":
        call(command, argv, functools.partial(function_of(command), flags=flags))
    elif flags:
        _send(command, argv, flags, devices)
    else:
        if devices:
            launch.check_unlaunched(devices)
        if devices > 1:
            return launch.launch([command, *argv], devices)
        call(command, argv)
    return 0


def _print_help(command: str, argv: Sequence[str]) -> None:
    """Print the flags of a command, those of several ranks and those of a cluster; and exit."""
    try:
        call(command, argv)
    finally:  # the parser has printed the first part, and exits
        if command in IN_RANKS:
            print(f"\n{launch.HELP}\n")
        parse_flags(["--help"], prog=f"ldae {command} ...")


def _send(command: str, argv: Sequence[str], flags: Sequence[str], devices: int) -> None:
    """Send a command to a cluster; its flags of --slurm are ``flags``."""
    if command in WITHOUT_JOBS:
        raise InputError(f"`ldae {command}` takes no {FLAG}: it is done in a moment")
    settings = set_tasks(parse_flags(flags, prog=f"ldae {command} ..."), devices)
    if command == "evaluate":
        _send_cells(argv, settings)
        return
    check_arguments(command, argv)  # refuse wrong arguments before the job waits for hours
    words = {f"ldae {command}": [command, *argv]}
    (job,) = send_array(words, settings, folder_of(settings, argv))
    if settings.cluster == "debug":
        job.results()


def _send_cells(argv: Sequence[str], settings: SlurmSettings) -> None:
    """Send the cells of a suite as an array of jobs."""
    module = import_module(function_of("evaluate").__module__)

    @functools.wraps(module.evaluate)
    def send(*args: object, **kwargs: object) -> None:
        module.send_cells(settings, *args, **kwargs)

    call("evaluate", argv, send)
