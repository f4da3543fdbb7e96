"""Checkpoints on disk: complete or absent, checked before they are used, pruned."""

import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thoughtbubbles.support.errors import InputError, RunError, one_line
from thoughtbubbles.support.files import read_record, write_text

SEAL_NAME = "seal.json"
PREFIX = "checkpoint-"
CHUNK = 1 << 20
# The names that runs give. Whatever else lies beside them, such as a copy that somebody made, is not theirs.
NAME = re.compile(rf"{PREFIX}(0|[1-9][0-9]*)")
LEAVING = re.compile(rf"\.{PREFIX}(0|[1-9][0-9]*)\.(partial|old)")


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint.

    Attributes:
        folder: holds it.
        step: optimizer steps taken.
        eval_loss: of the evaluation at that very step; None if there was none.
    """

    folder: Path
    step: int
    eval_loss: float | None


def seal(folder: Path, step: int, eval_loss: float | None) -> None:
    """Note the size and checksum of every file of a checkpoint, and what it is."""
    files = {path.relative_to(folder).as_posix(): _facts(path) for path in _files(folder)}
    content = {"step": step, "eval_loss": eval_loss, "files": files}
    write_text(folder / SEAL_NAME, json.dumps(content, indent=2) + "\n")


def sealed(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first. Their files are not read: `damage` does that."""
    found = [_read_seal(path) for path in _named(folder)]
    kept = [checkpoint for checkpoint in found if isinstance(checkpoint, Checkpoint)]
    return sorted(kept, key=lambda checkpoint: checkpoint.step)


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        files = read_record(checkpoint.folder / SEAL_NAME)["files"]
        return next((wrong for name, facts in files.items() if (wrong := _wrong(checkpoint.folder, name, facts))), None)
    except (InputError, OSError) as error:
        return one_line(error)


def _wrong(folder: Path, name: str, facts: list[int]) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != facts[0]:
        return f"{name} has {path.stat().st_size} bytes, expected {facts[0]}"
    return None if _facts(path) == facts else f"{name} is not what was written"


def newest_sound(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are whole; a warning for each newer one that is damaged."""
    for path in sorted(_named(folder)):
        if isinstance(seal_damage := _read_seal(path), str):
            warn(f"checkpoint {path} is damaged ({seal_damage}): not used")
    for checkpoint in reversed(sealed(folder)):
        if (wrong := damage(checkpoint)) is None:
            return checkpoint
        warn(f"checkpoint {checkpoint.folder} is damaged ({wrong}): using the one before it")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the one of lowest validation loss."""
    found = sealed(folder)
    losses = {each.folder: each.eval_loss for each in found if each.eval_loss is not None}
    finite = {path: loss for path, loss in losses.items() if math.isfinite(loss)}
    best = min(finite, key=lambda path: finite[path], default=None)
    for checkpoint in found[:-keep]:
        # A link was made by somebody else, and so was what it leads to.
        if checkpoint.folder != best and not checkpoint.folder.is_symlink():
            # Under another name it no longer counts, should the removal be interrupted.
            doomed = checkpoint.folder.rename(folder / f".{checkpoint.folder.name}.old")
            shutil.rmtree(doomed)


def clear_leavings(folder: Path) -> None:
    """Remove what killed processes left: half-written checkpoints and half-removed ones."""
    for path in folder.glob(f".{PREFIX}*"):
        if LEAVING.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _named(folder: Path) -> list[Path]:
    """The folders that have the name of a checkpoint."""
    return [path for path in folder.glob(f"{PREFIX}*") if NAME.fullmatch(path.name) and path.is_dir()]


def _read_seal(folder: Path) -> Checkpoint | str:
    """The checkpoint in a folder, or what is wrong with its seal."""
    try:
        content = read_record(folder / SEAL_NAME)
    except InputError:
        return f"{SEAL_NAME} is missing or broken"
    step, eval_loss, files = (content.get(name) for name in ("step", "eval_loss", "files"))
    if type(step) is not int or type(eval_loss) not in (int, float, type(None)) or not _are_facts(files):
        return f"{SEAL_NAME} is missing or broken"
    if folder.name != f"{PREFIX}{step}":
        return f"{SEAL_NAME} is of step {step}"
    return Checkpoint(folder, step, eval_loss)


def _are_facts(files: Any) -> bool:
    """Whether they are the sizes and checksums of one file or more, by name."""
    if not isinstance(files, dict) or not files:
        return False
    return all(isinstance(each, list) and [type(value) for value in each] == [int, int] for each in files.values())


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL_NAME)


def _facts(path: Path) -> list[int]:
    """Size in bytes and CRC-32."""
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return [size, checksum]


def disk_full(folder: Path) -> RunError:
    """What to say then."""
    return RunError(f"no space left on the disk of {folder}; {last_checkpoint(folder)}")


def last_checkpoint(folder: Path) -> str:
    """From where the next start goes on, in words."""
    found = sealed(folder)
    return f"the last checkpoint is {found[-1].folder}" if found else "there is no checkpoint yet"
