"""Files and folders that are whole or absent: written under a temporary name, flushed to the disk, renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    partial, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("partial", "old"))
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
