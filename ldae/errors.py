"""The exceptions whose message is meant for the user."""

LOST_RANK = 75  # exit status: sysexits.h's "temporary failure, try again"


class InputError(ValueError):
    """Wrong input, told in one sentence that names the file or the setting.

    The command line prints the sentence without a traceback and exits with status 2.
    """


class LostRank(InputError):
    """Another process of the run is gone or hangs: the input is not wrong, and trying again may help.

    The command line exits with status ``LOST_RANK``, after which a job is requeued.
    """


def first_line(error: Exception) -> str:
    """What a library's exception says, short enough to stand inside of a sentence."""
    if isinstance(error, KeyError):  # its text is the key alone
        return f"there is no {error}"
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(" .")
