"""The exceptions with messages for the user, and how a process ends with them."""

import difflib
import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

LOST_RANK = 75  # exit status EX_TEMPFAIL of sysexits.h: a temporary failure, try again later
_LONGEST = 80  # characters of a name in a message


class InputError(ValueError):
    """Wrong input, described in one sentence that names the file or the setting.

    The command line prints the sentence without a traceback and exits with ``exit_status``.
    """

    exit_status = 2


class LostRank(InputError):
    """The loss of another rank, which has ended or hangs.

    The input is not wrong, and another start may succeed: a job with this status is requeued.
    """

    exit_status = LOST_RANK


class DifferentResult(InputError):
    """The numbers of a repeated evaluation, when they are not those of the first one.

    The input is not wrong. The exit status tells this from a refusal.
    """

    exit_status = 1


def exit_status(error: BaseException) -> int:
    """Return the exit status of a process that ends with ``error``."""
    if isinstance(error, KeyboardInterrupt):  # by Ctrl-C, or with the number of another signal
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    return getattr(error, "exit_status", 1)


def report(error: Exception) -> None:
    """Print the sentence of an error to stderr, once: several callers may report the same error."""
    if not getattr(error, "is_reported", False):
        print(f"ldae: {error}", file=sys.stderr, flush=True)
        error.is_reported = True  # type: ignore[attr-defined]  # a mark of this function


def first_line(error: Exception) -> str:
    """Return the first line of a library's error message, to be part of another sentence."""
    if isinstance(error, KeyError):  # its text is the key alone
        return f"there is no {error}"
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(" .")


def import_extra(module: str, extra: str, need: str) -> ModuleType:
    """Import a module of an optional package, which ``pip install 'ldae[extra]'`` installs.

    Raises: InputError, with ``need`` as the start of its sentence, when it is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        raise InputError(f"{need}: pip install 'ldae[{extra}]'") from None


def nearest(name: str, known: Iterable[str], likeness: float = 0.0) -> str:
    """Return the known name most like ``name``; "" when none reaches ``likeness``, 0 to 1."""
    start = name[:_LONGEST]  # the content of any file may be named, and the search takes n^2 steps
    return next(iter(difflib.get_close_matches(start, known, n=1, cutoff=likeness)), "")


def quoted(name: object) -> str:
    """Return a name or a value as it was written, cut if it is too long for a sentence."""
    text = str(name)
    return repr(name) if len(text) <= _LONGEST else repr(text[:_LONGEST] + "...")


def unknown(sentence: str, name: object, known: Iterable[str], more: str = "") -> InputError:
    """Return the refusal of a name: ``sentence``, the name, the nearest known one, and ``more``.

    >>> raise unknown("there is no row", "l_dea", rows)
    InputError: there is no row 'l_dea'; the nearest is 'l_dae'
    """
    near = nearest(str(name), known)
    return InputError(
        f"{sentence} {quoted(name)}" + (f"; the nearest is {near!r}" if near else "") + more
    )
