"""A suite file: backbones, data sets and protocols, whose every combination is a cell of a table."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ldae.errors import InputError
from ldae.evals.evaluation import Setup, file_name
from ldae.evals.protocol import Grader, Protocol, flags
from ldae.runs import layout
from ldae.tree import check, check_known, convert, read_toml


def _without_files(types: dict[str, Any]) -> dict[str, Any]:
    """Leave out the settings that name a file to write, which would be one cell's alone."""
    return {name: t for name, t in types.items() if Path not in (t, *get_args(t))}


_SETUP = _without_files(flags(Setup))


class Column(NamedTuple):
    """A table [protocols.NAME] of a suite: a grader and its protocol."""

    name: str
    grader: Grader
    protocol: Protocol
    options: dict[str, Any]
    """Keywords of the grader beside protocol and setup."""
    settings: dict[str, Any]
    """The settings of protocol and options as the suite gives them."""
    data: tuple[str, ...]
    """Names of the data sets."""
    changes: dict[str, Any]
    """Changes of the setup."""


@dataclass(frozen=True)
class Cell:
    """One backbone by one column on one data set; the names are the suite's."""

    backbone: str
    data: str
    column: Column
    spec: str
    train: str
    eval: str | None
    setup: Setup

    def __str__(self) -> str:
        return f"{self.column.name} of {self.backbone} on {self.data}"

    @property
    def opened(self) -> tuple[str, Setup]:
        """What opens the network, with defaults for the settings that do not decide its weights."""
        own = self.setup
        return self.spec, Setup(
            random_init=own.random_init, in_chans=own.in_chans, img_size=own.img_size, seed=own.seed
        )

    @property
    def takes_classifier(self) -> bool:
        """Whether the grader takes the whole network and not only what is before its head."""
        return self.column.grader.takes("classifier")

    def run(self) -> dict:
        """Grade the backbone, and return what results.json holds.

        A grader without eval_data grades the images of eval where there are some.

        Raises: InputError, as the grader does.
        """
        grader, protocol, options = self.column.grader, self.column.protocol, self.column.options
        data = {"data": self.eval or self.train}
        if grader.takes("eval_data"):
            data = {"data": self.train, "eval_data": self.eval}
        return grader.function(self.spec, **data, protocol=protocol, **options, setup=self.setup)

    @property
    def results(self) -> Path:
        return self.setup.out / layout.RESULTS


def read_suite(
    path: Path, specs: tuple[str, ...], setup: Setup, graders: dict[str, Grader]
) -> list[Cell]:
    """Return the cells of a suite by backbone, data set and protocol: ``specs``, then its own backbones.

    ``setup`` has what the suite does not say otherwise; each cell's ``out`` is a folder below its.

    Raises: InputError, naming the file and the key, for a key that is not known, a value of another
        type or out of its range, and settings that do not go together.
    """
    with _at(f"suite {path}"):
        return _cells(read_toml(path), specs, setup, graders)


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Put the place in the file before the sentence of a refusal."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _cells(
    suite: dict, specs: tuple[str, ...], setup: Setup, graders: dict[str, Grader]
) -> list[Cell]:
    check_known("the suite", suite, ("backbones", "data", "protocols"))
    backbones = [(None, spec, setup) for spec in specs] + _backbones(suite, setup)
    if not backbones:
        raise InputError("name a backbone on the command line, or in [[backbones]]")
    data = {name: _data(name, table) for name, table in _tables(suite, "data").items()}
    columns = [
        _column(name, table, tuple(data), graders)
        for name, table in _tables(suite, "protocols").items()
    ]
    cells: dict[Path, Cell] = {}
    for name, spec, own in backbones:
        random = "-random-init" if own.random_init else ""
        name = name or f"{file_name(spec)}{random}"
        for data_name, (train, test) in data.items():
            for column in columns:
                if data_name not in column.data:
                    continue
                out = setup.out / name / data_name / column.name
                if out in cells:
                    raise InputError(
                        f"two backbones are called {name}: give one a name of its own, in [[backbones]]"
                    )
                its = replace(own, **column.changes, out=out)
                check(its, f"[protocols.{column.name}] ")
                cells[out] = Cell(name, data_name, column, spec, train, test, its)
    return list(cells.values())


def _backbones(suite: dict, setup: Setup) -> list[tuple[str | None, str, Setup]]:
    entries = suite.get("backbones", [])
    if not isinstance(entries, list):
        raise InputError("backbones are a list of tables, each under [[backbones]]")
    found = []
    for number, table in enumerate(entries, 1):
        where = f"[[backbones]] {number}"
        given = _take(where, table, {"name": str, "spec": str, **_SETUP})
        name, spec = given.pop("name", None), given.pop("spec", None)
        if spec is None:
            raise InputError(f"{where} has no spec")
        if name is not None:
            _check_name(where, name)
        own = replace(setup, **{"random_init": False} | given)
        check(own, f"{where} ")
        found.append((name, spec, own))
    return found


def _data(name: str, table: object) -> tuple[str, str | None]:
    given = _take(f"[data.{name}]", table, {"train": str, "eval": str})
    if "train" not in given:
        raise InputError(f"[data.{name}] has no train")
    return given["train"], given.get("eval")


def _column(name: str, table: object, data: tuple[str, ...], graders: dict[str, Grader]) -> Column:
    where = f"[protocols.{name}]"
    _check_table(where, table)
    verb = table.get("verb", name)
    if not isinstance(verb, str) or verb not in graders:
        raise InputError(f"{where} has the verb {verb!r}, and there are {', '.join(graders)}")
    grader = graders[verb]
    choice = {"protocol": str} if len(grader.protocols) > 1 else {}
    with _at(where):
        kind = grader.choose(table.get("protocol") if choice else None, table)
    own, options, setup = flags(kind), _without_files(grader.options), dict(_SETUP)
    del setup["random_init"]  # which belongs to a backbone, not to how it is graded
    types = {"verb": str, "data": tuple[str, ...]} | choice | own | options | setup
    given = _take(where, table, types)
    on = given.get("data", data)
    for unknown in set(on).difference(data):
        raise InputError(f"{where} names the data {unknown!r}, and there are {', '.join(data)}")

    def part(names: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in given.items() if key in names}

    with _at(where):
        protocol = kind(**part(own))
    settings = part(choice | own | options)
    return Column(name, grader, protocol, part(options), settings, on, part(setup))


def _tables(suite: dict, key: str) -> dict[str, object]:
    found = suite.get(key)
    if not isinstance(found, dict) or not found:
        raise InputError(f"there is no table [{key}.NAME]")
    for name in found:
        _check_name(f"[{key}.{name}]", name)
    return found


def _check_name(where: str, name: str) -> None:
    if not re.fullmatch(r"\w[\w.=+-]*", name):
        raise InputError(f"{where}: {name!r} cannot be a folder's name; use letters, digits and -")


def _take(where: str, table: object, types: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a table, as these types. Raises: InputError for another key or type."""
    _check_table(where, table)
    check_known(where, table, types)
    with _at(where):
        return {key: convert(key, value, types[key]) for key, value in table.items()}


def _check_table(where: str, table: object) -> None:
    if not isinstance(table, dict):
        raise InputError(f"{where} must be a table, not {table!r}")
