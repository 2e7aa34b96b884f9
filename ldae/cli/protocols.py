"""Commands with a protocol, whose fields are the flags: ``ldae linear ... --protocol NAME``."""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, get_type_hints

import tyro

from ldae.cli.commands import GRADERS, function_of
from ldae.cli.flags import call_with_flags, named_flags, split_options
from ldae.evals.protocol import Grader


def graders() -> dict[str, Grader]:
    """Return the commands with a protocol by name."""
    return {name: Grader(name, function_of(name)) for name in GRADERS}


def call_with_protocol(command: str, argv: Sequence[str], function: Callable) -> None:
    """Read ``--protocol`` first where there are several, as its fields become flags."""
    grader = Grader(command, function)
    kinds = grader.protocols
    named = split_options(argv, protocol="")[0].protocol if len(kinds) > 1 else ""
    kind = grader.choose(named, named_flags(argv))

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
    call.__doc__ = function.__doc__
    signature = inspect.Signature(
        [part.replace(annotation=types[name]) for name, part in parameters.items()]
    )
    call.__signature__ = signature  # type: ignore[attr-defined]  # for inspect
    call_with_flags(command, argv, call)
