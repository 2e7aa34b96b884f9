"""The texts of ``--help``: what to type for each setting, and its description in whole lines."""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

_REGISTRY = ConstructorRegistry()
# Defaults that are no value to type: their descriptions say what holds without the setting.
_UNSET = ("None", "''", "", "False")


def call_with_words(
    function: Callable, argv: Sequence[str], prog: str, description: str, config: Sequence[Any] = ()
) -> Any:
    """Call a function with command line arguments, and return what it returns.

    The flags come from its parameters; those of a dataclass are its fields.

    Raises: SystemExit after --help, and for arguments that cannot be parsed.
    """

    def call(*args: object, **kwargs: object) -> Any:
        return function(*args, **kwargs)

    parameters = [_described(part) for part in inspect.signature(function).parameters.values()]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # for inspect
    call.__annotations__ = {part.name: part.annotation for part in parameters}
    call.__doc__ = _unbroken_arguments(inspect.getdoc(function) or "")
    return tyro.cli(
        call,
        prog=prog,
        args=argv,
        description=description,
        config=config,
        registry=_REGISTRY,
    )


@_REGISTRY.struct_rule
def _read_settings(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Return how tyro reads a dataclass of settings, whose fields tyro would break into lines."""
    if not (inspect.isclass(info.type) and dataclasses.is_dataclass(info.type)):
        return None
    hints = typing.get_type_hints(info.type, include_extras=True)
    docs = {name: doc for kind in info.type.__mro__[-2::-1] for name, doc in _docs(kind).items()}
    given = info.default if dataclasses.is_dataclass(info.default) else None
    parts = [
        StructFieldSpec(
            part.name,
            _with_words(hints[part.name], _word(hints[part.name], part.name)),
            getattr(given, part.name) if given is not None else _default(part),
            docs.get(part.name),
        )
        for part in dataclasses.fields(info.type)
    ]
    return StructConstructorSpec(info.type, tuple(parts))


def _default(part: dataclasses.Field) -> Any:
    """Return the default of a field in the form of tyro."""
    if part.default_factory is not dataclasses.MISSING:
        return part.default_factory()
    return tyro.MISSING if part.default is dataclasses.MISSING else part.default


def _docs(kind: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class, each on one line."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError):  # no source, such as that of a class made by a call
        return {}
    return {
        field.target.id: " ".join(text.value.value.split()).replace("``", "`")
        for field, text in itertools.pairwise(getattr(tree, "body", ()))
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _unbroken_arguments(doc: str) -> str:
    """Return a docstring with each argument on one line that begins with a capital letter."""
    doc = re.sub(r"\n {8,}", " ", doc).replace("``", "`")
    return re.sub(r"(?m)^( {4}\w+: )([a-z]+ )", lambda found: found[1] + found[2].capitalize(), doc)


def _described(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a parameter of a function with what to type for it."""
    hint, name = parameter.annotation, parameter.name
    word = _word(hint, name)
    if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        word = name.upper() if parameter.default is parameter.empty else f"[{name.upper()}]"
    return parameter.replace(annotation=_with_words(hint, word))


def _with_words(hint: Any, word: str | None) -> Any:
    """Return a type with what to type for it, unless the type says that itself."""
    kind, *more = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    if dataclasses.is_dataclass(kind):
        return hint
    return Annotated[(kind, tyro.conf.arg(metavar=word, help_behavior_hint=_hint), *more)]


def _hint(default: str) -> str:
    """Return the words on the default of a setting that stand behind its description."""
    if default == "True":
        return "(on by default; this flag turns it off)"
    return "" if default in _UNSET else f"(default: {default})"


def _word(hint: Any, name: str) -> str | None:
    """Return what to type for a setting: N, NUMBER, PATH, its choices, its name, or nothing."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        specs = [part for part in options[1:] if isinstance(part, PrimitiveConstructorSpec)]
        return specs[0].metavar if specs else _word(options[0], name)
    if kind is Literal:
        return f"{{{','.join(map(str, options))}}}"
    if kind in (typing.Union, types.UnionType):
        words = [_word(part, name) or "{True,False}" for part in options if part is not type(None)]
        choices = ",".join(word.strip("{}") for word in words)
        return f"{{{choices}}}" if len(words) > 1 else words[0]
    if kind is tuple:
        word = _word(options[0], name) or "{True,False}"
        return f"{word} ..." if options[-1] is ... else " ".join([word] * len(options))
    words_of = {int: "N", float: "NUMBER", bool: None, Path: "PATH"}
    return words_of.get(hint, name.upper().replace("_", "-"))
