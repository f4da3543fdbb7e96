"""The error for bad input."""


class InputError(ValueError):
    """Bad input from a user: one line that names the value and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """
