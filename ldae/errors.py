"""The one exception whose message is meant for the user."""


class InputError(ValueError):
    """Wrong input, told in one sentence that names the file or the setting.

    The command line prints the sentence without a traceback and exits with status 2.
    """
