"""Settings as a tree of frozen dataclasses: the values they take, dotted names, changes, YAML.

Beside the tree: checks of the settings that an entry of a registry takes, and the reading of TOML
and YAML files as nested tables.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import pkgutil
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import yaml
from tyro.constructors import PrimitiveConstructorSpec

from ldae.errors import InputError, first_line, quoted, unknown

Settings = TypeVar("Settings")
_MOST_VALUES = 10_000  # in a file of settings
# No settings are nested so deeply, and YAML takes seconds for a thousand brackets.
_DEEP = re.compile(r"([\[{]\s*){33}")


class Range(NamedTuple):
    """The range of a setting: finite numbers from ``low`` to ``high``, without the open ends."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    or_zero: bool = False

    def check(self, name: str, value: float) -> None:
        """Raise InputError when a value of the setting ``name`` is out of range."""
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


class KeyOf(PrimitiveConstructorSpec[str]):
    """The names that a setting takes: the keys of a registry, such as ``ldae.noise:SCHEDULES``.

    The registry is imported only when a name is checked or listed, for two reasons: settings lie
    below the code that they choose from, and printing a configuration must not import torch. For
    tyro the name is a string; the help lists the names, and ``check`` refuses other names.
    """

    def __init__(self, registry: str) -> None:
        self.registry = registry

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(pkgutil.resolve_name(self.registry))

    def check(self, name: str, value: str) -> None:
        """Raise InputError with the nearest name when the registry has no ``value``."""
        if value not in self.names:
            raise unknown(f"{name} must be {self}, not", value, self.names)

    def __str__(self) -> str:
        return " or ".join(self.names)

    # The interface of tyro.
    nargs = 1
    metavar = property(lambda self: f"{{{','.join(self.names)}}}")
    instance_from_str = staticmethod(lambda words: words[0])
    str_from_instance = staticmethod(lambda value: [value])
    is_instance = staticmethod(lambda value: isinstance(value, str))
    # The inherited methods read metavar, and would import the registry.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


AnyPath = Annotated[
    str | Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str | Path),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A path, or what may be named in its place, such as a timm name. The command line gives a str."""

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
    """Return every leaf by its dotted name, in the order of the tree."""
    return {name: value for name, value, _ in _leaves(config)}


def check(settings: Any, prefix: str = "") -> None:
    """Raise InputError for the first setting of a tree with a value that it does not take."""
    for name, value, hint in _leaves(settings, prefix):
        _check(name, value, hint)


def _check(name: str, value: Any, hint: Any) -> None:
    """Raise InputError when the setting ``name``, annotated as ``hint``, does not take a value."""
    for allowed in getattr(hint, "__metadata__", ()):
        # A setting with a range may also take a word or None.
        checked = {Range: int | float, KeyOf: str}.get(type(allowed), ())
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, checked):
                allowed.check(name, part)


def replace(config: Settings, changes: Mapping[str, Any]) -> Settings:
    """Return settings with the leaves of these dotted names changed.

    Args:
        config: any settings: of a run, a protocol or a setup.
        changes: dotted name -> value, as in ``{"optim.epochs": 50, "data.flip": True}``.

    Raises: InputError for an unknown name, with the nearest known one, and for a value that the
        setting does not take.

    Examples:
        >>> longer = ldae.replace(config, {"optim.epochs": 800})
    """
    hints = {name: hint for name, _, hint in _leaves(config)}
    for name in changes:
        if name not in hints:
            raise unknown("there is no setting", name, hints)
    return put(config, {name: convert(name, changes[name], hints[name]) for name in changes})


def put(config: Any, leaves: dict[str, Any], prefix: str = "") -> Any:
    """Return ``config`` with these leaves changed, without checks: for constants of the package."""
    values = {}
    for part in dataclasses.fields(config):
        name, value = prefix + part.name, getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            values[part.name] = put(value, leaves, f"{name}.")
        elif name in leaves:
            values[part.name] = leaves[name]
    return dataclasses.replace(config, **values)


def convert(name: str, value: Any, hint: Any) -> Any:
    """Return ``value`` as the type of the setting ``name``.

    YAML and TOML have no tuples, and YAML reads 1e-4 as text.

    Raises: InputError for another type, or for a value that the setting does not take.
    """
    try:
        value = _as(hint, value)
    except TypeError:
        raise InputError(f"setting {name!r} takes {_words(hint)}, not {quoted(value)}") from None
    _check(name, value, hint)
    return value


def convert_fields(settings: Any) -> None:
    """Convert each field of a frozen dataclass as ``convert`` does, while it is initialised.

    Raises: InputError as ``convert`` does; fields of any type are taken as they are.
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for part in dataclasses.fields(settings):
        if hints[part.name] is not Any:
            value = convert(part.name, getattr(settings, part.name), hints[part.name])
            object.__setattr__(settings, part.name, value)


def taken_by(function: Callable, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are parameters of an entry of a registry."""
    parameters = inspect.signature(function).parameters
    return {name: settings[name] for name in parameters if name in settings}


def _as(hint: Any, value: Any) -> Any:
    """Return a value as the type ``hint``. Raises: TypeError when it cannot be that."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if getattr(value, "ndim", None) == 0:  # a number of numpy, such as np.logspace gives
        value = value.item()
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
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    if hint is str and isinstance(value, Path):
        return str(value)
    if type(value) is hint or (hint is Path and isinstance(value, Path)):
        return value
    raise TypeError


def _words(hint: Any) -> str:
    """Return a type in words, for an error message."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        return _words(options[0])
    if kind is Literal:
        return " or ".join(map(str, options))
    if kind in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in options)
    if kind is tuple:
        return f"a list of {_words(options[0])}"
    if hint is dict:
        return "a table"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def check_known(where: str, table: dict, known: Iterable[str]) -> None:
    """Raise InputError for the first key of a table that is not known, with the nearest one."""
    for key in table:
        if key not in known:
            raise unknown(f"{where} has no setting", key, known)


def check_used(
    settings: Any, chosen: str, takers: dict[str, Iterable[str]], prefix: str = ""
) -> None:
    """Check that every setting that is off by default is on only if the chosen entry takes it.

    Args:
        chosen: the name of an entry of a registry.
        takers: for each entry, the names of the settings that it takes.

    Raises: InputError with the setting and the entries that take it.
    """
    for name, default in flatten(type(settings)()).items():
        entries = [entry for entry, names in takers.items() if name in names]
        if entries and chosen not in entries and not default and getattr(settings, name):
            raise InputError(
                f"{prefix}{name} is a setting of {' and '.join(entries)}, not of {chosen}"
            )


def difference(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Return the leaves that differ: dotted name -> (old value, new value)."""
    before, after = flatten(old), flatten(new)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def to_yaml(config: Any) -> str:
    """Return a tree of settings as nested YAML, which ``read_yaml`` reads."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # JSON turns tuples into lists
    return yaml.safe_dump(plain, sort_keys=False)


def read_toml(path: Path) -> dict:
    """Read a TOML file.

    Raises: InputError when this fails; its message continues a sentence about the file.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"it is not a TOML file: {first_line(error)}") from None


def read_yaml(path: Path) -> dict:
    """Read a YAML file of settings, which may be empty.

    Raises: InputError naming the file when it is missing or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if _DEEP.search(text):
            raise ValueError("nested too deeply")
        table = yaml.safe_load(text) or {}
    except OSError as error:
        raise InputError(f"configuration {path} cannot be read: {error.strerror}") from None
    except Exception:  # of values that are not what their tag says, YAML raises nearly every type
        raise InputError(f"configuration {path} is not a YAML file") from None
    if not isinstance(table, dict):
        raise InputError(f"configuration {path} holds no settings")
    if _is_larger(table, _MOST_VALUES):
        raise InputError(f"configuration {path} holds more than {_MOST_VALUES:,} values")
    return table


def _is_larger(value: Any, most: int) -> bool:
    """Return whether a tree has more than ``most`` values.

    The count ends there, because aliases in YAML can make a tree endless.
    """
    waiting = [value]
    while waiting and most >= 0:
        part, most = waiting.pop(), most - 1
        if isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return bool(waiting)


def flatten_table(table: dict, prefix: str = "") -> dict[str, Any]:
    """Return every value of nested tables under its dotted name."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            values |= flatten_table(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values
