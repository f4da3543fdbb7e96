"""The work folder: what a preparation has done so far, beside its output, until the output takes its name."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from thoughtbubbles.support.errors import (
    DataError,
    SourceError,
    UnfinishedError,
    as_os_error,
    is_path_error,
    os_reason,
)
from thoughtbubbles.support.files import flush, flush_entry, lock, made_folder, partial_path, write_text
from thoughtbubbles.support.progress import say

LOCK = "lock"
JOB = "job.json"
SHARDS = "shards"
SURVEY = "survey"
RESULT = "result"
OLD = "old"


@contextmanager
def locked_work(output: Path) -> Iterator[Path]:
    """The work folder of an output, `.NAME.partial` beside it, for this process alone.

    In the end it is removed unless it holds work that a later start can use.

    Raises:
        DataError: it cannot be made, or another process prepares the same output.
        UnfinishedError: the disk is full or broken.
    """
    work = partial_path(output)
    with ExitStack() as stack:
        try:
            stack.enter_context(made_folder(output.parent))
            stack.enter_context(_lock(work, output))
        except OSError as error:
            kind = DataError if is_path_error(error) else UnfinishedError
            raise kind(f"output {output} cannot be written: {os_reason(error)}") from error
        try:
            _restore(work, output)
            yield work
        finally:
            if not has_work(work) and not (work / OLD).exists():
                shutil.rmtree(work, ignore_errors=True)


@contextmanager
def resumable(work: Path, output: Path, fingerprint: str, progress: bool) -> Iterator[None]:
    """Work in a locked folder on the job of a fingerprint; what another job left there is removed first.

    Bad input and success remove what is done; whatever else stops the work leaves it for the next start, and so does a
    source that may come back.

    Raises:
        UnfinishedError: the disk is full, or cannot be written.
    """
    if _fingerprint(work) != fingerprint:
        if has_work(work):
            say(f"{work} holds the start of another preparation, of other sources or options: removed", progress)
        _clear(work)
        write_text(work / JOB, json.dumps({"fingerprint": fingerprint}))
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped{_what_stays(work)}", progress)
        raise
    except (UnfinishedError, SourceError) as error:
        raise type(error)(f"{error}{_what_stays(work)}") from error
    except DataError:
        _clear(work)
        raise
    except Exception as error:
        if (found := as_os_error(error)) is None:
            raise
        raise UnfinishedError(f"output {output} cannot be written: {os_reason(found)}{_what_stays(work)}") from error
    with suppress(OSError):  # the output is there: what cannot be removed is no failure
        _clear(work)


def discard_work(output: Path, fingerprint: str) -> None:
    """Remove the work of a job whose output is there: a process was killed after its last renaming."""
    if _fingerprint(partial_path(output)) == fingerprint:
        with suppress(DataError, UnfinishedError, OSError), locked_work(output) as work:
            _clear(work)


def publish(work: Path, output: Path) -> None:
    """Give the result its name; what had that name is removed last, and comes back if the renaming fails."""
    flush(work / RESULT)
    replaces = output.exists()
    if replaces:
        output.rename(work / OLD)
    try:
        (work / RESULT).rename(output)
    except BaseException:
        if replaces:
            (work / OLD).rename(output)
        raise
    flush_entry(output.parent)


def fresh(path: Path) -> Path:
    """An empty folder of this name."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()
    return path


def has_work(work: Path) -> bool:
    """Whether something is there that a later start need not do again."""
    return (work / SURVEY).is_dir() or any((work / SHARDS).glob("[0-9]*"))


def _what_stays(work: Path) -> str:
    return f"; what is done stays in {work}, the same call goes on" if has_work(work) else ""


def _lock(work: Path, output: Path) -> IO[bytes]:
    while True:
        work.mkdir(exist_ok=True)
        try:
            file = (work / LOCK).open("ab")
        except FileNotFoundError:  # removed in between by the process that has just finished
            continue
        if not lock(file):
            file.close()
            raise DataError(f"output {output} is being prepared by another process")
        # Another process may have removed the folder, and the file with it, before the lock was ours.
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == (work / LOCK).stat().st_ino:
                return file
        file.close()


def _restore(work: Path, output: Path) -> None:
    """Bring back what was to be replaced, if a process died between the two renamings."""
    if (work / OLD).exists() and not output.exists():
        (work / OLD).rename(output)


def _fingerprint(work: Path) -> str | None:
    try:
        return str(json.loads((work / JOB).read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _clear(work: Path) -> None:
    for entry in work.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
