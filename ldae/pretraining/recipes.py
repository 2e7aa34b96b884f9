"""The recipes of all kinds of pre-training by name: the rows of the paper, and their rivals."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from ldae import trajectory, tree
from ldae.errors import InputError, unknown
from ldae.runs import kinds
from ldae.settings import UNNAMED_SIZES


class Recipes(Protocol):
    """The module of the recipes of one kind."""

    DEFAULT: str
    """The recipe that a file of settings changes."""
    SUMMARIES: dict[str, str]
    """Name of a recipe -> a line about it."""

    def config(self, name: str, scale: str) -> Any:
        """Return the settings of a recipe at a scale. Raises: InputError for another scale."""


def recipes_of(kind: str) -> Recipes:
    """Return the recipes of a kind of run."""
    return cast(Recipes, import_module(kinds.KINDS[kind].recipes))


def find(name: str | int, among: Iterable[str] = ()) -> tuple[str, str]:
    """Return the kind and the name of a recipe; the number of a row stands for its name.

    Args:
        among: kinds of run that may have the recipe; by default those that pre-train an encoder.

    Raises: InputError when none of them has it, with the kind that does or the nearest name.
    """
    numbered = {str(row.number): row.name for row in trajectory.ROWS}
    name, among = numbered.get(str(name), str(name)), tuple(among) or tuple(kinds.pretrainings())
    known = {
        recipe: kind
        for kind in (*reversed(kinds.pretrainings()), *reversed(among))
        for recipe in recipes_of(kind).SUMMARIES
    }
    if name not in known:
        own = [recipe for recipe, kind in known.items() if kind in among]
        raise unknown("there is no row", name, own, " (`ldae show` lists all)")
    if known[name] not in among:
        nouns = [kinds.KINDS[kind].noun for kind in (known[name], *among)]
        raise InputError(f"{name} is a recipe of {nouns[0]}, not of {' or '.join(nouns[1:])}")
    return known[name], name


def config(
    name: str | int = trajectory.DEFAULT,
    scale: str = "paper",
    init_from: str | Path = "",
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """Return the settings of a recipe at a scale: a row of the paper, or a rival such as ``mae``.

    Args:
        name: the name or number of a row, or the name of a rival; ``ldae show`` lists them.
        scale: paper, small or demo.
        init_from: a plain ViT to start from, which then decides the sizes of the network.
        changes: dotted name of a setting -> value.

    Raises: InputError for a recipe, a scale or a setting that does not exist, and for a value that
        a setting does not take.

    Examples:
        >>> changes = {"data.source": "photos/", "optim.epochs": 100}
        >>> config = ldae.config("l_dae", scale="small", changes=changes)
        >>> config.optim.epochs
    """
    kind, name = find(name)
    changes = changes or {}
    start = str(changes.get("init_from", init_from))
    return tree.replace(_starting(recipes_of(kind).config(name, scale), start), changes)


def name_of(settings: Any, kind: str) -> str:
    """Return the recipe whose settings these are, sizes aside, by name; "custom" if there is none.

    Recipes other than the rows of the paper are known by their kind.
    """
    if recipes_of(kind) is not trajectory:
        return recipes_of(kind).DEFAULT
    row = trajectory.row_of(settings)
    return row.name if row else "custom"


def _starting(settings: Any, init_from: str) -> Any:
    return tree.put(settings, UNNAMED_SIZES | {"init_from": init_from}) if init_from else settings


def read(path: Path, scale: str, among: Iterable[str] = (), init_from: str = "") -> Any:
    """Return the settings in a YAML file, which changes the default recipe of its kind at a scale.

    Args:
        init_from: as in ``config``, unless the file has its own.
        among: the kinds of run that the file may be for; by default those that pre-train an
            encoder. The first is the kind of a file that names none.

    Raises: InputError naming the file, as ``kinds.load``.
    """
    among = tuple(among) or tuple(kinds.pretrainings())
    given = kinds.kind_of_file(path)
    kind = given if given in among else among[0]
    recipes = recipes_of(kind)
    init_from = str(tree.read_yaml(path).get("init_from") or init_from)
    base = _starting(recipes.config(recipes.DEFAULT, scale), init_from)
    return kinds.load(path, kind, base)
