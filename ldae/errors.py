"""The exceptions with messages for the user."""

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
