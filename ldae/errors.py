"""The exceptions with messages for the user."""

import difflib
from collections.abc import Iterable

LOST_RANK = 75  # exit status EX_TEMPFAIL of sysexits.h: a temporary failure, try again later


class InputError(ValueError):
    """Wrong input, described in one sentence that names the file or the setting.

    The command line prints the sentence without a traceback and exits with status 2.
    """


class LostRank(InputError):
    """The loss of another rank, which has ended or hangs.

    The input is not wrong, and another start may succeed. The command line exits with status
    ``LOST_RANK``, after which a job is requeued.
    """


def first_line(error: Exception) -> str:
    """Return the first line of a library's error message, to be part of another sentence."""
    if isinstance(error, KeyError):  # its text is the key alone
        return f"there is no {error}"
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(" .")


def nearest(name: str, known: Iterable[str], likeness: float = 0.0) -> str:
    """Return the known name that is most like ``name``; "" when none reaches ``likeness``, 0 to 1."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=likeness)), "")


def unknown(sentence: str, name: object, known: Iterable[str], more: str = "") -> InputError:
    """Return the refusal of a name: ``sentence``, the name, the nearest known one, and ``more``.

    >>> raise unknown("there is no row", "l_dea", rows)
    InputError: there is no row 'l_dea'; the nearest is 'l_dae'
    """
    near = nearest(str(name), known)
    return InputError(
        f"{sentence} {name!r}" + (f"; the nearest is {near!r}" if near else "") + more
    )
