"""A suite file: the backbones, data sets and protocols whose every combination is a cell of a table."""

import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ldae.errors import InputError
from ldae.evals.evaluation import Setup, file_name
from ldae.runs import layout
from ldae.tree import check, check_known, checked, read_toml

Graders = dict[str, Callable[..., dict]]
"""What a protocol may be, by its verb: functions of (backbone or classifier, /, data[, eval_data], *,
..., setup) that return what results.json holds. Their own settings are read off their signatures. One
without eval_data grades the images of eval where there are some."""


@dataclass(frozen=True)
class Cell:
    """One backbone by one protocol on one data set; the names are the suite's."""

    backbone: str
    data: str
    protocol: str
    spec: str
    train: str
    eval: str | None
    verb: str
    function: Callable[..., dict]
    settings: dict[str, Any]
    """Of the verb, those that the suite gives."""
    setup: Setup

    def __str__(self) -> str:
        return f"{self.protocol} of {self.backbone} on {self.data}"

    @property
    def opened(self) -> tuple:
        """What says which network it is: all that ``load_backbone`` takes, in its order."""
        setup = self.setup
        return self.spec, setup.random_init, setup.in_chans, setup.img_size, setup.seed

    @property
    def takes_classifier(self) -> bool:
        """Whether its verb grades the whole network and not what is before its head."""
        return "classifier" in _parameters(self.function)

    def run(self) -> dict:
        """What results.json holds. Raises: InputError, as the verb does."""
        data = {"data": self.train, "eval_data": self.eval}
        if "eval_data" not in _parameters(self.function):
            data = {"data": self.eval or self.train}
        return self.function(self.spec, **data, **self.settings, setup=self.setup)

    @property
    def results(self) -> Path:
        return self.setup.out / layout.RESULTS


def read_suite(path: Path, specs: tuple[str, ...], setup: Setup, graders: Graders) -> list[Cell]:
    """The cells of a suite, by backbone, data set and protocol: ``specs`` first, then its own backbones.

    ``setup`` is what the suite does not say otherwise; each cell's ``out`` is a folder below its.

    Raises: InputError, naming the file and the key, for what is not known or of another type.
    """
    try:
        return _cells(read_toml(path), specs, setup, graders)
    except InputError as error:
        raise InputError(f"suite {path}: {error}") from None


def _cells(suite: dict, specs: tuple[str, ...], setup: Setup, graders: Graders) -> list[Cell]:
    check_known("the suite", suite, ("backbones", "data", "protocols"))
    backbones = [(None, spec, setup) for spec in specs] + _backbones(suite, setup)
    if not backbones:
        raise InputError("name a backbone on the command line, or in [[backbones]]")
    data = {name: _data(name, table) for name, table in _tables(suite, "data").items()}
    protocols = {
        name: _protocol(name, table, tuple(data), graders)
        for name, table in _tables(suite, "protocols").items()
    }
    cells: dict[Path, Cell] = {}
    for name, spec, own in backbones:
        random = "-random-init" if own.random_init else ""
        name = name or f"{file_name(spec)}{random}"
        for data_name, (train, evaluation) in data.items():
            for protocol, (verb, on, settings, changes) in protocols.items():
                if data_name not in on:
                    continue
                out = setup.out / name / data_name / protocol
                if out in cells:
                    raise InputError(
                        f"two backbones are called {name}: give one a name of its own, in [[backbones]]"
                    )
                its = replace(own, **changes, out=out)
                check(its, f"[protocols.{protocol}] ")
                given = (
                    name,
                    data_name,
                    protocol,
                    spec,
                    train,
                    evaluation,
                    verb,
                    graders[verb],
                    settings,
                    its,
                )
                cells[out] = Cell(*given)
    return list(cells.values())


def _backbones(suite: dict, setup: Setup) -> list[tuple[str | None, str, Setup]]:
    entries = suite.get("backbones", [])
    if not isinstance(entries, list):
        raise InputError("backbones are a list of tables, each under [[backbones]]")
    found = []
    for number, table in enumerate(entries, 1):
        where = f"[[backbones]] {number}"
        given = _take(where, table, {"name": str, "spec": str, **_setup_types(Setup)})
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


def _protocol(
    name: str, table: object, data: tuple[str, ...], graders: Graders
) -> tuple[str, tuple, dict, dict]:
    """Verb, names of data sets, settings of the verb, changes of the setup."""
    where = f"[protocols.{name}]"
    verb = table.get("verb", name) if isinstance(table, dict) else name
    if not isinstance(verb, str) or verb not in graders:
        raise InputError(f"{where} has the verb {verb!r}, and there are {', '.join(graders)}")
    own, setup = _setting_types(graders[verb])
    setup.pop("random_init", None)  # which says what a backbone is, not how it is graded
    given = _take(where, table, {"verb": str, "data": tuple[str, ...], **own, **setup})
    on = given.get("data", data)
    for other in set(on).difference(data):
        raise InputError(f"{where} names the data {other!r}, and there are {', '.join(data)}")
    return verb, on, *({k: v for k, v in given.items() if k in part} for part in (own, setup))


def _setting_types(function: Callable) -> tuple[dict[str, Any], dict[str, Any]]:
    """The types of a verb's own settings, and of its setup's, by name."""
    hints = typing.get_type_hints(function)
    names = [
        name
        for name, parameter in _parameters(function).items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "setup"
    ]
    return _without_files({name: hints[name] for name in names}), _setup_types(hints["setup"])


def _parameters(function: Callable) -> typing.Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _setup_types(setup: type) -> dict[str, Any]:
    hints = typing.get_type_hints(setup)
    return _without_files({part.name: hints[part.name] for part in fields(setup)})


def _without_files(types: dict[str, Any]) -> dict[str, Any]:
    """A file that is written is one cell's alone, so a suite names none."""
    return {name: t for name, t in types.items() if Path not in (t, *typing.get_args(t))}


def _tables(suite: dict, key: str) -> dict[str, object]:
    found = suite.get(key)
    if not isinstance(found, dict) or not found:
        raise InputError(f"there is no table [{key}.NAME]")
    for name in found:
        _check_name(f"[{key}.{name}]", name)
    return found


def _check_name(where: str, name: str) -> None:
    if not re.fullmatch(r"\w[\w.=+-]*", name):
        raise InputError(f"{where}: {name!r} can not be a folder's name; use letters, digits and -")


def _take(where: str, table: object, types: dict[str, Any]) -> dict[str, Any]:
    """What a table says, as these types. Raises: InputError for another key or type."""
    if not isinstance(table, dict):
        raise InputError(f"{where} must be a table, not {table!r}")
    check_known(where, table, types)
    try:
        return {key: checked(key, value, types[key]) for key, value in table.items()}
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
