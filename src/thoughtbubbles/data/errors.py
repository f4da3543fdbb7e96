"""The one error that the data path raises for bad input."""

from thoughtbubbles.errors import InputError


class DataError(InputError):
    """Bad input to the data path: one line that names the value and what was expected."""
