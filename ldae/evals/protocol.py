"""Graders and protocols: a grader is a command, and the fields of its protocol are its flags."""

from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from inspect import signature
from typing import Any, ClassVar, get_args, get_type_hints

from tyro.conf import Fixed

from ldae.errors import InputError, unknown
from ldae.tree import convert_fields

_, _FIXED = get_args(Fixed[int])


@dataclass(frozen=True)
class Protocol:
    """Every constant that decides the numbers of an evaluation.

    A constant is written once, as a field: its default, its range and, below it, the help of its
    flag. Every field is a flag of the command unless it is ``Fixed``; only Python can change those.
    The seed of the setup sets a field ``seed``. Lists become tuples.

    Raises: InputError for a value of another type or out of range, and for an empty list if the
        default is not empty.
    """

    shares_features: ClassVar[bool] = False
    """Whether the grader reads ``Evaluation.features``, which are extracted once for several."""

    def __post_init__(self) -> None:
        convert_fields(self)
        for part in fields(self):
            if getattr(self, part.name) == () and part.default not in ((), MISSING):
                raise InputError(f"{part.name} must name at least one")

    def _set(self, name: str, value: object) -> None:
        """Set a field of this frozen object while it is initialised."""
        object.__setattr__(self, name, value)

    @property
    def headlines(self) -> tuple[str, ...]:
        """Names of the results that a command prints."""
        return ("top1", "top5")

    @property
    def headline(self) -> str:
        """Name of the result that a suite's table shows."""
        return self.headlines[0]

    @property
    def depends_on_seed(self) -> bool:
        """Whether the seed decides the numbers, if the backbone has no random weights."""
        return hasattr(self, "seed")

    def file_hashes(self) -> dict[str, str]:
        """Return the SHA-256 of files that fields name, whose content decides the numbers too.

        Raises: InputError for a file that cannot be read.
        """
        return {}


def flags(settings: type) -> dict[str, Any]:
    """Return the types of the fields that are flags, by name."""
    types, marked = get_type_hints(settings), get_type_hints(settings, include_extras=True)
    return {
        part.name: types[part.name]
        for part in fields(settings)
        if _FIXED not in getattr(marked[part.name], "__metadata__", ())
    }


@dataclass(frozen=True)
class Grader:
    """A command that grades a backbone or a classifier on a data set; a suite may name it."""

    name: str
    function: Callable[..., dict]
    """Takes (backbone or classifier, data[, eval_data], *, protocol, setup[, options]), and returns
    the content of results.json. The type of ``protocol`` names the protocols."""

    @property
    def protocols(self) -> dict[str, type[Protocol]]:
        """The protocols by name; the first one is the default."""
        hint = get_type_hints(self.function)["protocol"]
        return {kind.name: kind for kind in get_args(hint) or (hint,)}

    @property
    def options(self) -> dict[str, Any]:
        """The types of the keywords other than protocol and setup, by name."""
        types, parameters = get_type_hints(self.function), signature(self.function).parameters
        keywords = [name for name, part in parameters.items() if part.kind is part.KEYWORD_ONLY]
        return {name: types[name] for name in keywords if name not in ("protocol", "setup")}

    def takes(self, parameter: str) -> bool:
        return parameter in signature(self.function).parameters

    def choose(self, name: str | None, given: Iterable[str]) -> type[Protocol]:
        """Return the protocol of this name, by default the first, and check the flags ``given``.

        Raises: InputError for an unknown name, and for a flag that only other protocols have.
        """
        protocols = self.protocols
        name = name or next(iter(protocols))
        if name not in protocols:
            raise unknown(f"{self.name} has no protocol", name, protocols)
        known = {flag for kind in protocols.values() for flag in flags(kind)}
        for flag in given:
            if flag in known.difference(flags(protocols[name])):
                raise InputError(f"the protocol {name} of {self.name} has no setting {flag}")
        return protocols[name]
