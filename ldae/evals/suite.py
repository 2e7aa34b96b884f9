"""Suite files: every combination of backbone, data set and protocol is a cell of a table."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

from ldae.errors import InputError, unknown
from ldae.evals.cell import Cell, Column
from ldae.evals.evaluation import Setup
from ldae.evals.naming import file_name
from ldae.evals.protocol import Grader, flags
from ldae.tree import Range, check_known, convert, read_toml


def _without_files(types: dict[str, Any]) -> dict[str, Any]:
    """Leave out the settings that name a file to write: cells would overwrite each other's."""
    return {name: t for name, t in types.items() if Path not in (t, *get_args(t))}


_SETUP = _without_files(flags(Setup))
_PERCENT = Annotated[float, Range(0, 100)]


class Backbone(NamedTuple):
    """A backbone of the command line, or a table of [[backbones]]."""

    name: str
    spec: str
    setup: Setup
    published: dict[str, dict[str, float]] = {}
    """Published numbers: data -> protocol -> percent, by their names in the suite."""


def read_suite(
    path: Path, specs: tuple[str, ...], setup: Setup, graders: dict[str, Grader]
) -> list[Cell]:
    """Return the cells of a suite by backbone, data set and protocol.

    The backbones of ``specs`` come before those of the file. ``setup`` holds unless the suite gives
    another value; the ``out`` of a cell is a folder below the ``out`` of ``setup``.

    Raises: InputError, naming the file and the key, for an unknown key, a value of another type or
        out of range, and contradicting settings.
    """
    with _place(f"suite {path}"):
        return _cells(read_toml(path), specs, setup, graders)


@contextmanager
def _place(where: str) -> Iterator[None]:
    """Prefix an InputError with its place in the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _cells(
    suite: dict, specs: tuple[str, ...], setup: Setup, graders: dict[str, Grader]
) -> list[Cell]:
    """Return the cells of the tables of a suite, see ``read_suite``."""
    check_known("the suite", suite, ("backbones", "data", "protocols"))
    data = {name: _data(name, table) for name, table in _tables(suite, "data").items()}
    columns = [
        _column(name, table, tuple(data), graders)
        for name, table in _tables(suite, "protocols").items()
    ]
    given = [Backbone(_default_name(spec, setup), spec, setup) for spec in specs]
    backbones = given + _backbones(suite, setup, data, columns)
    if not backbones:
        raise InputError("name a backbone on the command line, or in [[backbones]]")
    cells: list[Cell] = []
    places = set()
    for name, spec, backbone_setup, published in backbones:
        for data_name, (train, test) in data.items():
            repeats: list[Cell] = []
            for column in columns:
                if data_name not in column.data:
                    continue
                place = (name, data_name, column.name)
                out = Path(setup.out, *place)
                with _place(f"[protocols.{column.name}]"):
                    cell_setup = replace(backbone_setup, **column.changes, out=out)
                number = published.get(data_name, {}).get(column.name)
                cell = Cell(*place[:2], column, spec, train, test, cell_setup, number)
                if place in places:
                    raise InputError(
                        f"two backbones are called {name}: give one another name, in [[backbones]]"
                    )
                places.add(place)
                repeats += cell.repeats()
            # Cells with the same random weights follow each other.
            cells += sorted(repeats, key=lambda cell: cell.network[1].seed)
    return cells


def _default_name(spec: str, setup: Setup) -> str:
    return file_name(spec) + ("-random-init" if setup.random_init else "")


def _backbones(
    suite: dict, setup: Setup, data: Iterable[str], columns: list[Column]
) -> list[Backbone]:
    """Return the backbones of [[backbones]]."""
    entries = suite.get("backbones", [])
    if not isinstance(entries, list):
        raise InputError("backbones are a list of tables, each under [[backbones]]")
    backbones = []
    for number, table in enumerate(entries, 1):
        where = f"[[backbones]] {number}"
        given = _values(where, table, {"name": str, "spec": str, "published": dict, **_SETUP})
        name, spec = given.pop("name", None), given.pop("spec", None)
        published = _published(where, given.pop("published", {}), data, columns)
        if spec is None:
            raise InputError(f"{where} has no spec")
        if name is not None:
            _check_name(where, name)
        with _place(where):
            backbone_setup = replace(setup, **{"random_init": False} | given)
        name = name or _default_name(spec, backbone_setup)
        backbones.append(Backbone(name, spec, backbone_setup, published))
    return backbones


def _published(
    where: str, tables: dict, data: Iterable[str], columns: list[Column]
) -> dict[str, dict[str, float]]:
    """Return the published numbers of a backbone: data -> protocol -> percent.

    Raises: InputError for a cell that the suite does not have, and for a number that is no percent.
    """
    published = {}
    for name, table in tables.items():
        if name not in data:
            raise unknown(f"{where} has published numbers of the data", name, data)
        protocols = {column.name: _PERCENT for column in columns if name in column.data}
        published[name] = _values(f"{where} published.{name}", table, protocols)
    return published


def _data(name: str, table: object) -> tuple[str, str | None]:
    """Return the sources train and eval of a table [data.NAME]; eval may be left out."""
    given = _values(f"[data.{name}]", table, {"train": str, "eval": str})
    if "train" not in given:
        raise InputError(f"[data.{name}] has no train")
    return given["train"], given.get("eval")


def _column(name: str, table: object, data: tuple[str, ...], graders: dict[str, Grader]) -> Column:
    """Return the column of a table [protocols.NAME]; ``data`` are all names of data sets."""
    where = f"[protocols.{name}]"
    _check_table(where, table)
    verb = table.get("verb", name)
    if not isinstance(verb, str) or verb not in graders:
        raise InputError(f"{where} has the verb {verb!r}, and there are {', '.join(graders)}")
    grader = graders[verb]
    choice = {"protocol": str} if len(grader.protocols) > 1 else {}
    with _place(where):
        kind = grader.choose(table.get("protocol") if choice else None, table)
    constants, options, setup = flags(kind), _without_files(grader.options), dict(_SETUP)
    del setup["random_init"]  # a property of the backbone, not of its grading
    types = {"verb": str, "data": tuple[str, ...]} | choice | constants | options | setup
    given = _values(where, table, types)
    on = given.get("data", data)
    for other in set(on).difference(data):
        raise InputError(f"{where} names the data {other!r}, and there are {', '.join(data)}")

    def part(names: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in given.items() if key in names}

    with _place(where):
        protocol = kind(**part(constants))
    return Column(name, grader, protocol, part(options), on, part(setup))


def _tables(suite: dict, key: str) -> dict[str, object]:
    """Return the tables [KEY.NAME] of a suite by name. Raises: InputError when there is none."""
    tables = suite.get(key)
    if not isinstance(tables, dict) or not tables:
        raise InputError(f"there is no table [{key}.NAME]")
    for name in tables:
        _check_name(f"[{key}.{name}]", name)
    return tables


def _check_name(where: str, name: str) -> None:
    if not re.fullmatch(r"\w[\w.=+-]*", name):
        raise InputError(f"{where}: {name!r} cannot be a folder's name; use letters, digits and -")


def _values(where: str, table: object, types: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a table in these types. Raises: InputError for another key or type."""
    _check_table(where, table)
    check_known(where, table, types)
    with _place(where):
        return {key: convert(key, value, types[key]) for key, value in table.items()}


def _check_table(where: str, table: object) -> None:
    if not isinstance(table, dict):
        raise InputError(f"{where} must be a table, not {table!r}")
