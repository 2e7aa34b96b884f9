"""The flags of a training: every setting of its configuration, --run, --dry-run and --seeds."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ldae.cli.commands import COMMANDS
from ldae.cli.flags import call_with_flags


def call_with_settings(
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
    call_with_flags(f"{command} {usage}", argv, call, description, prefixes=True)
