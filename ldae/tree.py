"""Operations on a tree of frozen dataclasses: what settings take, dotted names, changes, files."""

import contextlib
import dataclasses
import importlib
import inspect
import math
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from tyro.constructors import PrimitiveConstructorSpec

from ldae.errors import InputError, first_line, unknown


class Range(NamedTuple):
    """The finite numbers that a setting takes: from ``low`` to ``high``, without open ends."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    or_zero: bool = False

    def check(self, name: str, value: float) -> None:
        """Check a value of the setting ``name``.

        Raises: InputError when it is out of range.
        """
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        inside = above and below and math.isfinite(value)
        if not inside and not (self.or_zero and value == 0):
            raise InputError(f"{name} must be {self}, not {value}")

    def __str__(self) -> str:
        words = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.high < math.inf:
            words += f" and {'below' if self.open_high else 'at most'} {self.high:g}"
        return f"0 or {words}" if self.or_zero else words


class Choice(PrimitiveConstructorSpec[str]):
    """The names that a setting takes: the keys of a registry, such as ``ldae.noise:SCHEDULES``.

    The registry is imported when a name is checked or listed, and not before: settings lie below
    the code that they choose from, and a configuration is printed without torch. To tyro a choice
    is a string, whose names the help of the command line lists; ``check`` refuses others.
    """

    def __init__(self, registry: str) -> None:
        self.registry = registry

    @property
    def names(self) -> tuple[str, ...]:
        module, registry = self.registry.split(":")
        return tuple(getattr(importlib.import_module(module), registry))

    def check(self, name: str, value: str) -> None:
        """Check a value of the setting ``name``.

        Raises: InputError with the nearest name when the registry lacks it.
        """
        if value not in self.names:
            raise unknown(f"{name} must be {self}, not", value, self.names)

    def __str__(self) -> str:
        return " or ".join(self.names)

    # What tyro asks for.
    nargs = 1
    metavar = property(lambda self: f"{{{','.join(self.names)}}}")
    instance_from_str = staticmethod(lambda words: words[0])
    str_from_instance = staticmethod(lambda value: [value])
    is_instance = staticmethod(lambda value: isinstance(value, str))
    # The inherited ones read all of these, and would import the registry.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, open_low=True)
COUNT = Range(1)
SHARE = Range(0, 1)
DECAY = Range(0, 1, open_high=True)


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name, the value and the annotated type of each leaf, in the tree's order."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for part in dataclasses.fields(config):
        name, value = prefix + part.name, getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value, hints[part.name]


def flatten(config: Any) -> dict[str, Any]:
    """Return every leaf under its dotted name, in the order of the tree."""
    return {name: value for name, value, _ in _leaves(config)}


def check(settings: Any, prefix: str = "") -> None:
    """Check every setting of a tree.

    Raises: InputError naming the first setting with a value that it does not take.
    """
    for name, value, hint in _leaves(settings, prefix):
        _check(name, value, hint)


def _check(name: str, value: Any, hint: Any) -> None:
    for allowed in getattr(hint, "__metadata__", ()):
        if isinstance(allowed, Range | Choice):
            for part in value if isinstance(value, tuple) else (value,):
                if part is not None:
                    allowed.check(name, part)


def replace(config: Any, changes: dict[str, Any]) -> Any:
    """Return ``config`` with the leaves of these dotted names changed.

    Raises: InputError for a name that does not exist, with the nearest one that does, and for a
        value that the setting does not take.
    """
    hints = {name: hint for name, _, hint in _leaves(config)}
    for name in changes:
        if name not in hints:
            raise unknown("there is no setting", name, hints)
    return put(config, {name: checked(name, changes[name], hints[name]) for name in changes})


def put(config: Any, leaves: dict[str, Any], prefix: str = "") -> Any:
    """Return ``config`` with these leaves in place, unchecked: for constants of the package."""
    values = {}
    for part in dataclasses.fields(config):
        name, value = prefix + part.name, getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            values[part.name] = put(value, leaves, f"{name}.")
        elif name in leaves:
            values[part.name] = leaves[name]
    return dataclasses.replace(config, **values)


def checked(name: str, value: Any, hint: Any) -> Any:
    """Return ``value`` as the type of its setting.

    YAML and TOML have no tuples, and YAML reads 1e-4 as text.

    Raises: InputError, naming the setting, for another type or a value that it does not take.
    """
    try:
        value = _as(hint, value)
    except TypeError:
        raise InputError(f"setting {name!r} takes {_words(hint)}, not {value!r}") from None
    _check(name, value, hint)
    return value


def taken_by(function: Callable, settings: dict[str, Any]) -> dict[str, Any]:
    """Return those of the settings that are parameters of a function or a class.

    An entry of a registry says by its signature which settings it reads.
    """
    parameters = inspect.signature(function).parameters
    return {name: settings[name] for name in parameters if name in settings}


def _as(hint: Any, value: Any) -> Any:
    """Raises: TypeError."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        return _as(options[0], value)
    if kind is Literal and value in options:
        return value
    if kind in (typing.Union, types.UnionType):
        for option in options:
            with contextlib.suppress(TypeError):
                return _as(option, value)
    if kind is tuple and isinstance(value, list | tuple):
        if options[-1] is not ... and len(value) != len(options):
            raise TypeError
        return tuple(_as(options[0], part) for part in value)
    if hint is float and isinstance(value, str | int) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    if type(value) is hint:
        return value
    raise TypeError


def _words(hint: Any) -> str:
    """A type, for a sentence."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        return _words(options[0])
    if kind is Literal:
        return " or ".join(map(str, options))
    if kind in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in options)
    if kind is tuple:
        return f"a list of {_words(options[0])}"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def check_known(where: str, table: dict, known: Iterable[str]) -> None:
    """Raises: InputError naming the first key that is not known, and the nearest one that is."""
    for key in table:
        if key not in known:
            raise unknown(f"{where} has no setting", key, known)


def check_own(
    settings: Any, chosen: str, takers: dict[str, Iterable[str]], prefix: str = ""
) -> None:
    """Check that no setting is on that only other entries of a registry take.

    Args:
        chosen: the name of the entry that is used.
        takers: the names of the settings that each entry takes.

    Raises: InputError naming the setting, which is off by default, and the entries that take it.
    """
    for name, default in flatten(type(settings)()).items():
        own = [entry for entry, names in takers.items() if name in names]
        if own and chosen not in own and not default and getattr(settings, name):
            raise InputError(f"{prefix}{name} is a setting of {' and '.join(own)}, not of {chosen}")


def difference(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """The leaves that differ: dotted name -> (old value, new value)."""
    before, after = flatten(old), flatten(new)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def to_yaml(config: Any) -> str:
    """Return a tree of settings as YAML, nested as ``update`` takes it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)


def read_toml(path: Path) -> dict:
    """Raises: InputError, without the name of the file, when it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"it is no TOML file: {first_line(error)}") from None


def read_yaml(path: Path) -> dict:
    """Read a YAML file of settings, which may be empty.

    Raises: InputError naming the file when it is missing, or holds something else.
    """
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"configuration {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"configuration {path} is not a YAML file") from None
    if not isinstance(table, dict):
        raise InputError(f"configuration {path} holds no settings")
    return table


def update(base: Any, table: dict) -> Any:
    """Return ``base`` changed by nested tables, which may hold a whole tree or a few settings.

    Raises: InputError as ``replace`` does.
    """
    return replace(base, flatten_table(table))


def flatten_table(table: dict, prefix: str = "") -> dict[str, Any]:
    """Return every value of nested tables under its dotted name."""
    values = {}
    for key, value in table.items():
        if isinstance(value, dict):
            values |= flatten_table(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values
