"""Flags: all those of a function, and the few that are read before it chooses its own."""

import argparse
import inspect
from collections.abc import Callable, Sequence

import tyro

from ldae.help import call_with_words

_NOT_IN_HELP = ("Args:", "Returns:", "Raises:", "Examples:")  # sections of a docstring


def call_with_flags(
    prog: str,
    argv: Sequence[str],
    function: Callable,
    description: str | None = None,
    prefixes: bool = False,
) -> None:
    """Call a function with command line arguments.

    With ``prefixes``, the flag of a setting is its dotted name; otherwise its last part.
    """
    config = [tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed]
    config += [] if prefixes else [tyro.conf.OmitArgPrefixes]
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    paragraphs = [" ".join(p.split()) for p in paragraphs if not p.startswith(_NOT_IN_HELP)]
    call_with_words(function, argv, f"ldae {prog}", description or "\n\n".join(paragraphs), config)


def split_options(argv: Sequence[str], **options: str) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of these names, with these defaults, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in options.items():
        spellings = dict.fromkeys((name, name.replace("-", "_")))  # tyro takes both
        parser.add_argument(*(f"--{spelling}" for spelling in spellings), default=default)
    return parser.parse_known_args(argv)


def named_flags(argv: Sequence[str]) -> list[str]:
    """Return the names of the flags of a command line, as they are in Python."""
    flags = (word[2:].partition("=")[0] for word in argv if word.startswith("--"))
    return [flag.replace("-", "_") for flag in flags]


def pop_positional(words: list[str]) -> str | None:
    """Take the first word out of ``words`` and return it; None if it is a flag."""
    return words.pop(0) if words and not words[0].startswith("-") else None


def asks_help(argv: Sequence[str]) -> bool:
    """Return whether --help is among the arguments."""
    return bool({"-h", "--help"} & set(argv))
