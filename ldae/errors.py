"""The one exception whose message is meant for the user."""


class InputError(ValueError):
    """Wrong input, told in one sentence that names the file or the setting.

    The command line prints the sentence without a traceback and exits with status 2.
    """


def first_line(error: Exception) -> str:
    """What a library's exception says, short enough to stand inside of a sentence."""
    if isinstance(error, KeyError):  # its text is the key alone
        return f"there is no {error}"
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(" .")
