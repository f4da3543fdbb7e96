"""Checkpoints on disk: complete or absent, checked before they are used, pruned."""

import json
import math
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from thoughtbubbles.support.errors import InputError, RunError, one_line
from thoughtbubbles.support.files import read_as, write_text

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


@dataclass(frozen=True)
class Seal:
    """What a checkpoint is, with size and checksum of each of its files."""

    step: int
    eval_loss: float | None
    files: dict[str, list[int]]


def seal(folder: Path, step: int, eval_loss: float | None) -> None:
    """Say of a checkpoint what it is: from now on it counts."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL_NAME)
    files = {path.relative_to(folder).as_posix(): _facts(path) for path in paths}
    write_text(folder / SEAL_NAME, json.dumps(asdict(Seal(step, eval_loss, files)), indent=2) + "\n")


def sealed(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first. Their files are not read: `damage` does that."""
    seals = {path: _read_seal(path) for path in _named(folder)}
    found = [Checkpoint(path, each.step, each.eval_loss) for path, each in seals.items() if isinstance(each, Seal)]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        files = read_as(Seal, checkpoint.folder / SEAL_NAME).files
        return next((wrong for name, facts in files.items() if (wrong := _wrong(checkpoint.folder, name, facts))), None)
    except (InputError, OSError) as error:
        return one_line(error)


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
            shutil.rmtree(checkpoint.folder.rename(folder / f".{checkpoint.folder.name}.old"))


def clear_leavings(folder: Path) -> None:
    """Remove what killed processes left: half-written checkpoints and half-removed ones."""
    for path in folder.glob(f".{PREFIX}*"):
        if LEAVING.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def disk_full(folder: Path) -> RunError:
    """What to say of a disk that has no room for a run's checkpoints."""
    return RunError(f"no space left on the disk of {folder}; {last_checkpoint(folder)}")


def last_checkpoint(folder: Path) -> str:
    """From where the next start goes on, in words."""
    found = sealed(folder)
    return f"the last checkpoint is {found[-1].folder}" if found else "there is no checkpoint yet"


def _named(folder: Path) -> list[Path]:
    """The folders that have the name of a checkpoint."""
    return [path for path in folder.glob(f"{PREFIX}*") if NAME.fullmatch(path.name) and path.is_dir()]


def _read_seal(folder: Path) -> Seal | str:
    """The seal of a checkpoint, or what is wrong with it."""
    try:
        found = read_as(Seal, folder / SEAL_NAME)
    except InputError:
        return f"{SEAL_NAME} is missing or broken"
    if not found.files or any(len(facts) != 2 for facts in found.files.values()):
        return f"{SEAL_NAME} is missing or broken"
    return found if folder.name == f"{PREFIX}{found.step}" else f"{SEAL_NAME} is of step {found.step}"


def _wrong(folder: Path, name: str, facts: list[int]) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != facts[0]:
        return f"{name} has {path.stat().st_size} bytes, expected {facts[0]}"
    return None if _facts(path) == facts else f"{name} is not what was written"


def _facts(path: Path) -> list[int]:
    """Size in bytes and CRC-32."""
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return [size, checksum]
