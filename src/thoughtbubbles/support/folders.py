"""Output folders: a command writes into a new or empty one, or into that of an earlier call of its own."""

import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from thoughtbubbles.support.errors import InputError, os_failure, os_reason
from thoughtbubbles.support.files import flush_entry, made_folder, partial_path, replacing

# A JSON file that a command writes into its folder, and keys that nobody else's file of that name has.
Marks = Mapping[str, Collection[str]]


@contextmanager
def output_folder(folder: Path, marks: Marks, option: str = "--output") -> Iterator[None]:
    """Make a command's output folder before the work; if the block raises, a new one that is empty goes again.

    Args:
        marks: any one of these files says that the folder is the command's own.
        option: names the folder in messages.

    Raises:
        InputError: something else is in the folder, or it cannot be made or written to.
        RunError: the disk is full or broken.
    """
    with ExitStack() as stack:
        with writing(folder, option):
            check_output(folder, marks, option)
            stack.enter_context(made_folder(folder))
            # What permissions do not show: a full disk, or one that is read alone.
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
        yield


@contextmanager
def writing(path: Path, option: str = "--output") -> Iterator[None]:
    """Say of an error of the system that it was `path`, given by an option, that could not be written."""
    try:
        yield
    except OSError as error:
        raise os_failure(error, f"{option} {path}: cannot be written: {os_reason(error)}") from error


def check_output(folder: Path, marks: Marks, option: str = "--output") -> None:
    """Check that a command may write into a folder: as `output_folder`, without making it.

    Raises:
        InputError: something else is there.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{option} {folder}: expected a folder, it is a file")
    if not folder.is_dir() or any(has_keys(folder / name, keys) for name, keys in marks.items()):
        return
    # What a killed process leaves is in nobody's way.
    if any(not (path.name.startswith(".") and path.name.endswith(".partial")) for path in folder.iterdir()):
        raise InputError(
            f"{option} {folder}: expected a new or empty folder, or that of an earlier call: something else is in it"
        )


def has_keys(path: Path, keys: Collection[str]) -> bool:
    """Whether a file holds a JSON object with these keys."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and set(keys) <= content.keys()


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`, to which its files move in the end, or none of them if the block raises."""
    staging = partial_path(folder / "files")
    with replacing(staging) as partial:
        partial.mkdir()
        yield partial
    try:
        files = sorted(staging.iterdir())
        for file in files:
            if (taken := folder / file.name).is_dir():
                raise InputError(f"{taken}: expected no folder where a file is to be written")
        for file in files:
            file.replace(folder / file.name)
        flush_entry(folder)
    finally:
        shutil.rmtree(staging)
