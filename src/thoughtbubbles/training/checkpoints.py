"""Checkpoints on disk: complete or absent, checked before they are used, pruned."""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from thoughtbubbles.files import write_text

SEAL_NAME = "seal.json"
PREFIX = "checkpoint-"
CHUNK = 1 << 20


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
    found = []
    for path in folder.glob(f"{PREFIX}*"):
        try:
            content = json.loads((path / SEAL_NAME).read_text(encoding="utf-8"))
            found.append(Checkpoint(path, int(content["step"]), content["eval_loss"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    files = json.loads((checkpoint.folder / SEAL_NAME).read_text(encoding="utf-8"))["files"]
    for name, facts in files.items():
        path = checkpoint.folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts[0]:
            return f"{name} has {path.stat().st_size} bytes, expected {facts[0]}"
        if _facts(path) != facts:
            return f"{name} is not what was written"
    return None


def newest_sound(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are whole; a warning for each newer one that is damaged."""
    unsealed = {path for path in folder.glob(f"{PREFIX}*") if path.is_dir()}
    found = sealed(folder)
    for path in sorted(unsealed - {checkpoint.folder for checkpoint in found}):
        warn(f"checkpoint {path} is damaged ({SEAL_NAME} is missing or broken): not used")
    for checkpoint in reversed(found):
        if (wrong := damage(checkpoint)) is None:
            return checkpoint
        warn(f"checkpoint {checkpoint.folder} is damaged ({wrong}): using the one before it")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the one of lowest validation loss."""
    found = sealed(folder)
    evaluated = [checkpoint for checkpoint in found if checkpoint.eval_loss is not None]
    best = min(evaluated, key=lambda checkpoint: checkpoint.eval_loss or 0.0, default=None)
    for checkpoint in found[:-keep]:
        if checkpoint != best:
            # Under another name it no longer counts, should the removal be interrupted.
            doomed = checkpoint.folder.rename(folder / f".{checkpoint.folder.name}.old")
            shutil.rmtree(doomed)


def clear_leavings(folder: Path) -> None:
    """Remove what killed processes left: half-written checkpoints and half-removed ones."""
    for path in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(path)


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
