"""What tells the files of a source from others, or from themselves after they have changed."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from thoughtbubbles.support.errors import DataError

END_BYTES = 1 << 20
# A parquet file ends with its footer, the length of it in so many bytes, and a mark.
LENGTH_BYTES = 4
MARK = b"PAR1"
THREADS = 8

Facts = tuple[str, int, str]


def stat_facts(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of files: any change shows, and so does a copy."""
    facts = [(str(path), path.stat()) for path in paths]
    return [(name, fact.st_size, fact.st_mtime_ns) for name, fact in facts]


def content_facts(paths: Iterable[Path]) -> list[Facts]:
    """Name, size, and sha256 of both ends of files: what a file keeps that is copied, moved or touched.

    The ends are the first and the last MiB, and the whole footer of a parquet file, which holds the place and the
    statistics of all that is in it.

    Raises:
        DataError: a file that cannot be read.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_content_facts, paths))


def _content_facts(path: Path) -> Facts:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(file.read(END_BYTES))
            file.seek(size - min(size, max(END_BYTES, _footer_bytes(path, file, size))))
            digest.update(file.read())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return path.name, size, digest.hexdigest()


def _footer_bytes(path: Path, file: IO[bytes], size: int) -> int:
    """The length of a parquet file's end that holds its footer; 0 of another file."""
    trailer = LENGTH_BYTES + len(MARK)
    if path.suffix.lower() != ".parquet" or size < trailer:
        return 0
    file.seek(size - trailer)
    length, mark = file.read(LENGTH_BYTES), file.read()
    return int.from_bytes(length, "little") + trailer if mark == MARK else 0
