"""Files and folders that are whole or absent: written under a temporary name, flushed to the disk, renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


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
    """
    partial, old = partial_path(path), path.with_name(f".{path.name}.old")
    _remove(partial)
    try:
        yield partial
        flush(partial)
    except BaseException:
        _remove(partial)
        raise
    if path.is_dir():
        _remove(old)
        path.rename(old)
    partial.replace(path)
    flush_entry(path.parent)
    _remove(old)


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
