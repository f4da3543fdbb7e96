"""Files and folders that are whole or absent: written under a temporary name, flushed to the disk, renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from thoughtbubbles.errors import as_os_error, os_reason

# Met while writing, and said without the name of the file.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


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
    with path.open("ab") as file:
        yield lock(file)


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
