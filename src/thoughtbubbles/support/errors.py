"""How a command ends other than by finishing: each is one line on standard error and an exit code."""

import errno
import os
import re
import shutil
from pathlib import Path

# A path that was given is to blame; for all else (a full disk, a broken one, the network) no input is.
PATH_ERRORS = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ENOTEMPTY", "EACCES", "EPERM", "EROFS", "ENAMETOOLONG", "ELOOP"),
        *("EINVAL", "EXDEV", "ENODEV", "ENXIO", "ESPIPE", "ETXTBSY"),
    )
)
# How libraries written in Rust and C++ say it in an exception of their own.
NUMBERED = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
# What libraries raise for a network that fails, beside the errors of Python; they need not be there.
NETWORK = {
    *(("httpx", "TransportError"), ("httpcore", "NetworkError"), ("urllib3", "HTTPError")),
    *(("requests", "ConnectionError"), ("requests", "Timeout"), ("requests", "ChunkedEncodingError")),
    *(("aiohttp", "ClientConnectionError"), ("aiohttp", "ClientPayloadError")),
}
OFFLINE = {("huggingface_hub", "OfflineModeIsEnabled")}
# Of a value in a message, which has one line.
MOST_CHARACTERS = 200


class InputError(ValueError):
    """Bad input from a user: one line that names the value and what was expected."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that cannot go on through no fault of its input: one line that says why and what is left."""

    exit_code = 1


class RunInterrupted(Exception):  # noqa: N818 (it is no error)
    """A signal came, and everything was saved: the next start goes on from here."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class DataError(InputError):
    """Bad input to the data path: one line that names the value and what was expected."""


class SourceError(DataError):
    """A source that is not there or is damaged, as far as can be told: what is done stays, should it come back."""


class UnfinishedError(RunError):
    """Work that something outside it stopped (network, disk): what is done stays, and the same call goes on."""


def one_line(error: BaseException) -> str:
    """What a library says of an error, in one line and without its advice."""
    text = str(error).partition("Example of usage")[0]
    return " ".join(text.split()) or type(error).__name__


def library_reason(error: BaseException) -> str:
    """As `one_line`, but where transformers wants leave to run the code of a folder: nobody is ever given it."""
    if "trust_remote_code" in str(error):
        return "it needs Python code of its own, which is not run: expected one without auto_map in its JSON files"
    return one_line(error)


def shown(value: object) -> str:
    """A value as a message shows it: its `repr`, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def as_os_error(error: BaseException) -> OSError | None:
    """The system's error that `error` is or, by its text, stands for; None if it is none."""
    if isinstance(error, OSError):
        return error
    if (found := NUMBERED.search(str(error))) is None:
        return None
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number))


def os_reason(error: OSError) -> str:
    """Why the system refused, in one line without the path."""
    return error.strerror or one_line(error)


def is_path_error(error: OSError) -> bool:
    """Whether a path that was given is to blame, rather than the disk or the network."""
    return error.errno in PATH_ERRORS


def os_failure(error: OSError, text: str | None = None) -> InputError | RunError:
    """How a command ends by an error of the system: bad input where a path is to blame, else a run that cannot go on.

    Args:
        text: the line to say; if not given, the path and the reason.
    """
    if text is None:
        path = "" if error.filename is None else f"{_decoded(error.filename)}: "
        text = path + os_reason(error)
    return InputError(text) if is_path_error(error) else RunError(text)


def _decoded(path: object) -> str:
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)


def is_network(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that the network or the other side of it failed.

    That it was turned off by a setting (HF_HUB_OFFLINE) is no failure.
    """
    while error is not None:
        kinds = {(each.__module__.partition(".")[0], each.__name__) for each in type(error).__mro__}
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if (
            isinstance(error, ConnectionError | TimeoutError) or kinds & NETWORK or status >= 500
        ) and not kinds & OFFLINE:
            return True
        error = error.__cause__ or error.__context__
    return False


def ending(error: BaseException) -> InputError | RunError | RunInterrupted | None:
    """How a command ends by an error, in one line; None for one that only a fault of the program raises."""
    if isinstance(error, InputError | RunError | RunInterrupted):
        return error
    if isinstance(error, RecursionError):
        return InputError("the input is nested too deeply")
    if is_out_of_memory(error):
        return RunError(f"out of memory: {one_line(error)}")
    found = as_os_error(error)
    return None if found is None else os_failure(found)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a GPU, could not be allocated."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether an error says, or hides, that no space is left: some libraries raise a bare RuntimeError for it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or (folder.exists() and shutil.disk_usage(folder).free < 1 << 16)
