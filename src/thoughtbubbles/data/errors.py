"""The errors that the data path raises for bad input and for work that could not be finished."""

from thoughtbubbles.errors import InputError


class DataError(InputError):
    """Bad input to the data path: one line that names the value and what was expected."""


class UnfinishedError(DataError):
    """Work that something outside it stopped (network, disk): what is done stays, and the same call goes on."""

    exit_code = 1


class SourceError(UnfinishedError):
    """A source that is not there or is damaged, as far as can be told: what is done stays, should it come back."""

    exit_code = 2
