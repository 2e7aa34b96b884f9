"""The arguments of a command: read by the kind of the command, and passed to its function."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass

from ldae import launch
from ldae.cli.commands import (
    BY_RECIPE,
    BY_ROW,
    GRADERS,
    RELIST,
    WITHOUT_JOBS,
    check_command,
    function_of,
)
from ldae.cli.flags import call_with_flags
from ldae.cli.protocols import call_with_protocol
from ldae.cli.recipes import call_with_recipe
from ldae.cli.rows import call_with_row
from ldae.errors import InputError
from ldae.tree import check


def call(command: str, argv: Sequence[str], function: Callable | None = None) -> None:
    """Call a command's function, or ``function`` in its place, with command line arguments.

    Raises: InputError and SystemExit for wrong arguments; and as the function.
    """
    if RELIST in argv and command not in (*WITHOUT_JOBS, "submit"):
        from ldae.data.listing import relisting  # imports torch, which `ldae show` does without

        with relisting():
            return call(command, [word for word in argv if word != RELIST], function)
    function = function or function_of(command)
    if command in BY_ROW:
        call_with_row(command, argv, function)
    elif command in BY_RECIPE:
        call_with_recipe(command, argv, function)
    elif command in GRADERS:
        call_with_protocol(command, argv, function)
    else:
        call_with_flags(command, argv, function)


def check_arguments(command: str, argv: Sequence[str]) -> None:
    """Check the arguments of a command without running it.

    Raises: InputError and SystemExit, as the command, for wrong arguments and values of settings;
        InputError for --devices, since a job has other settings for its ranks.
    """
    check_command(command)
    if launch.split_devices(argv)[1]:
        raise InputError(f"a job has slurm.tasks_per_node ranks on each machine, not {launch.FLAG}")
    if command in BY_RECIPE:  # with a size, the backbone is not opened, which may not exist yet
        argv = ["--size", "B", *argv]

    @functools.wraps(function_of(command))
    def check_settings(*args: object, **kwargs: object) -> None:
        for settings in filter(is_dataclass, (*args, *kwargs.values())):
            check(settings)

    call(command, argv, check_settings)
