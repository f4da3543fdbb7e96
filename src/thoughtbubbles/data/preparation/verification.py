"""Verification: whether a prepared folder still holds what was prepared, byte for byte.

What was found of a file is remembered with its size and times, outside of the folder, which may be read-only.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thoughtbubbles.data.preparation.manifest import MANIFEST_NAME, Manifest
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.files import write_text
from thoughtbubbles.support.progress import say, stage

# Larger folders take minutes: only those who ask wait for them.
LARGE_BYTES = 20_000_000_000
PIECE_BYTES = 1 << 24
BLOCKS_SUFFIX = ".arrow"


@dataclass(frozen=True)
class Found:
    """What a file held when it was read whole.

    Attributes:
        size, modified, changed: bytes, and the times of the last change of content and of anything, in nanoseconds.
        sha256: in hexadecimal.
        ids: the least and the greatest token id of a file of blocks; None for others, and for one without blocks.
    """

    size: int
    modified: int
    changed: int
    sha256: str
    ids: tuple[int, int] | None


def hash_folder(folder: Path) -> dict[str, str]:
    """Sha256 of every file below a folder but its manifest, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def verify(folder: Path, manifest: Manifest, always: bool = False, progress: bool = False) -> None:
    """Check every file of a prepared folder by its sha256, and every token id against the vocabulary.

    Args:
        always: read everything; otherwise only what has not been read since it changed last, and nothing of a folder of
            20 GB and more.
        progress: show a bar where there is something to read, and say what is not read.

    Raises:
        DataError: a file is missing, has changed, or holds ids that the vocabulary lacks; naming it.
    """
    stats = {name: _stat(folder, name) for name in manifest.files}
    known = {} if always else _recall(folder)
    unread = [name for name, stat in stats.items() if name not in known or _times(known[name]) != stat]
    total = sum(stats[name][0] for name in unread)
    if total >= LARGE_BYTES and not always:
        say(f"{folder}: {total / 1e9:,.0f} GB that were not checked; --verify does", progress)
        return
    found = {name: known[name] for name in stats if name not in unread}
    if unread:
        with stage(f"Checking {folder.name}", total, progress) as bar:
            for name in unread:
                sha256 = _sha256(folder / name, lambda size: bar.advance(size, "bytes"))
                _check_same(folder / name, sha256, manifest.files[name])
                ids = _ids(folder / name) if name.endswith(BLOCKS_SUFFIX) else None
                found[name] = Found(*stats[name], sha256, ids)
    for name, each in found.items():
        _check_same(folder / name, each.sha256, manifest.files[name])
        if each.ids is not None and not 0 <= each.ids[0] <= each.ids[1] < manifest.vocab_size:
            raise DataError(
                f"{folder / name} holds token ids from {each.ids[0]} to {each.ids[1]}, expected some below "
                f"{manifest.vocab_size}, the manifest's vocab_size: prepare the data again, with --overwrite"
            )
    if unread:
        _remember(folder, found)


def _check_same(path: Path, sha256: str, expected: str) -> None:
    if sha256 != expected:
        raise DataError(
            f"{path} has changed since it was prepared: its sha256 is {sha256[:12]}..., the manifest says "
            f"{expected[:12]}...; bring it back, or prepare the data again, with --overwrite"
        )


def _stat(folder: Path, name: str) -> tuple[int, int, int]:
    if not (folder / name).is_file():
        raise DataError(f"{folder} is incomplete: {name} is missing, prepare the data again, with --overwrite")
    facts = (folder / name).stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _times(found: Found) -> tuple[int, int, int]:
    return found.size, found.modified, found.changed


def _sha256(path: Path, on_progress: Callable[[int], None] | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            if on_progress is not None:
                on_progress(len(piece))
    return digest.hexdigest()


def _ids(path: Path) -> tuple[int, int] | None:
    """The least and the greatest token id of a file of blocks."""
    import pyarrow

    least, greatest = [], []
    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as batches:
        for batch in batches:
            ids = batch.column("input_ids").flatten().to_numpy(zero_copy_only=True)
            if len(ids):
                least.append(int(ids.min()))
                greatest.append(int(ids.max()))
    return (min(least), max(greatest)) if least else None


def _memory(folder: Path) -> Path:
    """The file that remembers what was found in a folder."""
    root = os.environ.get("THOUGHTBUBBLES_CACHE")
    place = Path(root) if root else Path.home() / ".cache" / "thoughtbubbles"
    return place / "verified" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()}.json"


def _recall(folder: Path) -> dict[str, Found]:
    with suppress(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError):
        content: Mapping[str, Any] = json.loads(_memory(folder).read_text(encoding="utf-8"))
        return {
            name: Found(**{**facts, "ids": facts["ids"] and (facts["ids"][0], facts["ids"][1])})
            for name, facts in content.items()
        }
    return {}


def _remember(folder: Path, found: Mapping[str, Found]) -> None:
    # Where nothing can be remembered, the next run reads again.
    with suppress(OSError, RuntimeError):
        path = _memory(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({name: asdict(each) for name, each in found.items()}))
