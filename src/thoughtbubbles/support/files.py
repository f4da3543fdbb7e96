"""Files and folders that are whole or absent: written under a temporary name, flushed to the disk, renamed."""

import errno
import json
import math
import os
import shutil
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from thoughtbubbles.support.errors import InputError, as_os_error, one_line, os_reason

LOCK_NAME = ".lock"
Record = TypeVar("Record")
# Met while writing, and said without the name of the file.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def json_text(value: Any, indent: int | None = None) -> str:
    """A value in strict JSON: null for the numbers that JSON has none for, NaN and the infinities."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def user_path(path: str | Path) -> Path:
    """A path with the home folder for a leading `~` or `~NAME`; as it is where nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; what had the name before is replaced."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object that was written to a file.

    Raises:
        InputError: it is not there, cut short, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, one_line(error)) from None
    if not isinstance(content, dict):
        raise damaged(path, "it holds no JSON object")
    return content


def read_as(kind: type[Record], path: Path) -> Record:
    """The dataclass whose fields were written to a file as a JSON object.

    Raises:
        InputError: as `read_record` does, or where a field is missing, unknown or of another type.
    """
    content, hints = read_record(path), typing.get_type_hints(kind)
    for name in dict.fromkeys([*hints, *content]):
        if name not in content or name not in hints or not _is_of(content[name], hints[name]):
            raise damaged(path, f"{name} is missing, unknown or of a wrong type")
    return kind(**content)


def damaged(path: Path, reason: str) -> InputError:
    """What to raise of a record that is not as it was written."""
    return InputError(f"{path} is damaged: {reason}")


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of a type: a plain one, a list or mapping of one, or one of several."""
    if isinstance(hint, types.UnionType):
        return any(_is_of(value, each) for each in typing.get_args(hint))
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Any:
        return True
    if kind is list:
        return isinstance(value, list) and all(_is_of(each, inner[0]) for each in value)
    if kind is dict:
        return isinstance(value, dict) and all(_is_of(each, inner[1]) for each in value.values())
    return type(value) is kind or (kind is float and type(value) is int)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to write a file or a folder to; it takes the name `path` in the end.

    What had the name before is replaced. If the block raises, what was written is removed and `path` is as it was.
    A process killed in between leaves `path` as it was or, at worst where a folder replaces a folder, absent with
    the old one beside it.

    Raises:
        OSError: also for what the libraries that write in the block say of the disk in exceptions of their own; it
            names `path`. A file does not replace a folder, nor a folder a file.
    """
    partial, old = partial_path(path), path.with_name(f".{path.name}.old")
    _remove(partial)
    try:
        yield partial
        flush(partial)
        if path.exists() and path.is_dir() != partial.is_dir():
            kind = errno.EISDIR if path.is_dir() else errno.ENOTDIR
            raise OSError(kind, os.strerror(kind), str(path))
    except BaseException as error:
        with suppress(OSError):
            _remove(partial)
        if (named := _naming(error, path, partial)) is not None:
            raise named from error
        raise
    if path.is_dir():
        _remove(old)
        path.rename(old)
    partial.replace(path)
    flush_entry(path.parent)
    _remove(old)


def _naming(error: BaseException, path: Path, partial: Path) -> OSError | None:
    """The same error of the disk with the name of the file that was to be; None for any other error."""
    found = as_os_error(error)
    if found is None or found.errno is None:
        return None
    inside = found.filename is not None and Path(os.fsdecode(found.filename)).is_relative_to(partial)
    return OSError(found.errno, os_reason(found), str(path)) if inside or found.errno in DISK_ERRORS else None


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Make a folder and those above it that are missing; if the block raises, those that are empty go again."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):
                each.rmdir()
        raise


def partial_path(path: Path) -> Path:
    """The temporary name under which `replacing` has `path` written."""
    return path.with_name(f".{path.name}.partial")


def flush(path: Path) -> None:
    """Bring a file, or a folder and all below it, to the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            flush(entry)
    flush_entry(path)


def flush_entry(path: Path) -> None:
    """Bring one file, or the names in one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def sole_user(path: Path) -> Iterator[bool]:
    """Lock the file `path` while the block runs; False if another process holds it.

    The lock goes with the process, however it ends. Where the platform or the file system has no locks, True.
    """
    while True:
        with path.open("ab") as file:
            alone = lock(file)
            # Whoever had it before may have removed the file in between.
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                continue
            yield alone
            return


@contextmanager
def claimed(path: Path, key: str, user: str, error: type[InputError]) -> Iterator[None]:
    """A folder, made if it is not there, that is this process's alone while the block runs.

    Args:
        key: of the recipe that names it, for messages.
        user: what works in such a folder, for messages.
        error: what to raise.

    Raises:
        InputError: it cannot be written, or another process is at it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(made_folder(path))
            alone = stack.enter_context(sole_user(path / LOCK_NAME))
        except OSError as reason:
            raise error(f"{key}={path}: {os_reason(reason)}, expected a folder to write to") from None
        if not alone:
            raise error(f"{key}={path} is in use by another {user}: expected a folder of its own")
        yield


def lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed; False if another process has locked it."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
