"""What a machine without a network is brought: files compressed one by one, each with its checksum."""

import bz2
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_parts.cases import REFERENCES_NAME
from thoughtbubbles.support.files import replacing

KIT_NAME = "kit.json"
DATA_NAME = "data"
# Ids are numbers of two bytes: what stands at even and at odd places is told apart.
TWO_BYTES = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, filters=TWO_BYTES),
}
UNPACKERS: dict[str, Callable[[bytes], bytes]] = {".bz2": bz2.decompress, ".xz": lzma.decompress}


def checksum(path: Path) -> str:
    """Sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pack_file(path: Path, target: Path) -> None:
    """Write a file in the smallest of some forms to `target` and a suffix."""
    content = path.read_bytes()
    suffix, packed = min(((suffix, pack(content)) for suffix, pack in PACKERS.items()), key=lambda each: len(each[1]))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_name(target.name + suffix).write_bytes(packed)


def unpack_folder(kit: Path, name: str, target: Path) -> Path:
    """A folder of the kit as it was, in `target`; what is there already is left.

    Raises:
        ValueError: for a kit without it, or a file that is not what was packed.
    """
    if target.exists():
        return target
    checksums: dict[str, str] = read_kit(kit)["files"]
    wanted = {path: digest for path, digest in checksums.items() if Path(path).parts[0] == name}
    if not wanted:
        raise ValueError(f"{kit} has no {name}: pack it with scripts/gpu_kit.py")
    with replacing(target) as partial:
        for path, digest in wanted.items():
            place = partial / Path(path).relative_to(name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(_unpacked(kit, path, digest))
    return target


def open_references(kit: Path) -> Path:
    """The file of references.

    Raises:
        ValueError: if the kit has none.
    """
    path = kit / REFERENCES_NAME
    if not path.exists():
        raise ValueError(f"{kit} has no {REFERENCES_NAME}: pack it with scripts/gpu_kit.py")
    return path


def read_kit(kit: Path) -> dict[str, Any]:
    """What a kit says of itself.

    Raises:
        ValueError: if there is none.
    """
    path = kit / KIT_NAME
    if not path.exists():
        raise ValueError(f"{kit} is no kit: expected a folder that scripts/gpu_kit.py packed")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _unpacked(kit: Path, path: str, digest: str) -> bytes:
    for suffix, unpack in UNPACKERS.items():
        packed = kit / (path + suffix)
        if packed.exists():
            content = unpack(packed.read_bytes())
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError(f"{packed} is not what was packed: pack the kit again")
            return content
    raise ValueError(f"{kit / path} is missing: pack the kit again")
