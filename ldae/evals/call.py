"""The call of an evaluation: the part of its record by which it can be repeated."""

import dataclasses
from collections.abc import Callable, Sequence
from inspect import BoundArguments, signature
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ldae import tree
from ldae.errors import InputError, unknown
from ldae.evals.protocol import Protocol
from ldae.files import as_json

# Settings that name files to write. A repetition writes its own.
_WRITTEN = ("out", "save_stats")


def describe_call(command: str, arguments: Sequence[Any], **settings: Any) -> dict:
    """Return a call of an evaluation for its record, in JSON's types.

    Args:
        command: the name of the command.
        arguments: the values of the first parameters of its function.
        settings: other parameters by name; those that are None are left out.
    """
    given = {name: _plain(value) for name, value in settings.items() if value is not None}
    return as_json({"command": command, "arguments": [*map(_plain, arguments)], "settings": given})


def _plain(value: Any) -> Any:
    """Return a value for JSON. A dataclass becomes a table, without the fields in ``_WRITTEN``."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return str(value) if isinstance(value, Path) else value
    parts = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
    return {name: _plain(part) for name, part in parts.items() if name not in _WRITTEN}


def bind_call(function: Callable, call: dict) -> BoundArguments:
    """Return the arguments of ``function`` in the call of a record.

    Raises: InputError when this version of ldae cannot repeat the call: it has another version of
        the protocol, or lacks a setting. TypeError when an argument is missing.
    """
    hints = get_type_hints(function, include_extras=True)
    given = dict(zip(signature(function).parameters, call["arguments"])) | call["settings"]
    for name in given:
        if name not in hints:
            raise unknown(f"{call['command']} has no setting", name, hints)
    restored = {name: _restore(name, value, hints[name]) for name, value in given.items()}
    bound = BoundArguments(signature(function), restored)
    complete = signature(function).bind(*bound.args, **bound.kwargs)
    complete.apply_defaults()
    return complete


def _restore(name: str, value: Any, hint: Any) -> Any:
    """Return a value of a call as the type of its parameter."""
    if not isinstance(value, dict):
        return tree.convert(name, value, hint)
    kinds = {
        getattr(kind, "name", None): kind
        for kind in (hint, *get_args(hint))
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    }
    if len(kinds) == 1:
        (kind,) = kinds.values()
    elif value.get("name") in kinds:
        kind = kinds[value["name"]]
    else:
        raise unknown(f"there is no {name}", value.get("name"), filter(None, kinds))
    if issubclass(kind, Protocol) and (made_by := value.get("version")) != kind.version:
        raise InputError(
            f"it was made by version {made_by} of the protocol {kind.name}, and this ldae has "
            f"version {kind.version}: their numbers cannot be compared"
        )
    return tree.replace(kind(), tree.flatten_table(value))
