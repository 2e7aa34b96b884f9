"""Operations on a tree of frozen dataclasses: ranges, dotted names, changes, differences, files."""

import contextlib
import dataclasses
import difflib
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from ldae.errors import InputError, first_line


class Range(NamedTuple):
    """The finite numbers that a setting takes, ``low`` to ``high``, without the ends that are open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    or_zero: bool = False

    def holds(self, value: float) -> bool:
        if self.or_zero and value == 0:
            return True
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        words = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.high < math.inf:
            words += f" and {'below' if self.open_high else 'at most'} {self.high:g}"
        return f"0 or {words}" if self.or_zero else words


NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, open_low=True)
COUNT = Range(1)
SHARE = Range(0, 1)
DECAY = Range(0, 1, open_high=True)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf under its dotted name, in the order of the tree."""
    leaves = {}
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{part.name}.")
        else:
            leaves[prefix + part.name] = value
    return leaves


def check(settings: Any, prefix: str = "") -> None:
    """Raises: InputError naming the first setting of the tree that is out of its range."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for part in dataclasses.fields(settings):
        name, value = prefix + part.name, getattr(settings, part.name)
        if dataclasses.is_dataclass(value):
            check(value, f"{name}.")
        allowed = [r for r in getattr(hints[part.name], "__metadata__", ()) if isinstance(r, Range)]
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not all(r.holds(number) for r in allowed):
                raise InputError(f"{name} must be {allowed[0]}, not {number}")


def replace(config: Any, changes: dict[str, Any]) -> Any:
    """``config`` with the leaves of these dotted names changed.

    Raises: InputError for a name that does not exist, with the nearest one that does, and for a
        value that the setting does not take.
    """
    known = flatten(config)
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise InputError(f"there is no setting {name!r}; the nearest is {near[0]!r}")
    return _replace(config, changes, "")


def _replace(config: Any, changes: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(type(config))
    values = {}
    for part in dataclasses.fields(config):
        name, value = prefix + part.name, getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            values[part.name] = _replace(value, changes, f"{name}.")
        elif name in changes:
            values[part.name] = checked(name, changes[name], hints[part.name])
    return dataclasses.replace(config, **values)


def checked(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type that the setting has; YAML and TOML know no tuples, and YAML reads 1e-4
    as text.

    Raises: InputError, naming the setting, when it is of another type.
    """
    try:
        return _as(hint, value)
    except TypeError:
        raise InputError(f"setting {name!r} takes {_words(hint)}, not {value!r}") from None


def _as(hint: Any, value: Any) -> Any:
    """Raises: TypeError."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
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
    if kind is Literal:
        return " or ".join(map(str, options))
    if kind in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in options)
    if kind is tuple:
        return f"a list of {_words(options[0])}"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def check_known(where: str, table: dict, known: typing.Iterable[str]) -> None:
    """Raises: InputError naming the first key that is not known, and the nearest one that is."""
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise InputError(f"{where} has no setting {key!r}; the nearest is {near!r}")


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
    """Raises: InputError, without the name of the file, when it can not be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"it can not be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"it is no TOML file: {first_line(error)}") from None


def read_yaml(path: Path) -> dict:
    """Read a YAML file of settings, which may be empty.

    Raises: InputError naming the file when it is missing, or holds something else.
    """
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"configuration {path} can not be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"configuration {path} is not a YAML file") from None
    if not isinstance(table, dict):
        raise InputError(f"configuration {path} holds no settings")
    return table


def update(base: Any, table: dict) -> Any:
    """Return ``base`` changed by nested tables, which may hold a whole tree or a few settings.

    Raises: InputError as ``replace`` does.
    """
    changes: dict[str, Any] = {}

    def collect(part: dict, prefix: str) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{key}.")
            else:
                changes[f"{prefix}{key}"] = value

    collect(table, "")
    return replace(base, changes)
