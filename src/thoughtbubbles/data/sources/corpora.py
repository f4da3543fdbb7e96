"""Corpora: from the name of a source to the files or the dataset that it stands for."""

import glob
import os
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thoughtbubbles.data.sources.formats import JSON, ROW_KINDS, TEXT, file_kind, holds_rows, known_suffixes
from thoughtbubbles.data.sources.hub import PREFIX, HubSource, make_source, parse_name
from thoughtbubbles.data.sources.rowtext import check_template
from thoughtbubbles.recipes.options import PYTHON_STDLIB
from thoughtbubbles.recipes.values import convert
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.files import user_path


@dataclass(frozen=True)
class FileSource:
    """A named source and the files that it stands for, in reading order.

    Attributes:
        name: the source as the user wrote it.
        files: the files, sorted by path, by the names under which they were found.
        field: the field of parquet and jsonl rows that holds the text; None is the one of the whole preparation.
        template: of Jinja over the fields of such a row, in place of `field`.
        left_out: files of the folders that are not read, as (suffix, number): of no known suffix, or settings in .json.
    """

    name: str
    files: tuple[Path, ...]
    field: str | None = None
    template: str | None = None
    left_out: tuple[tuple[str, int], ...] = ()

    @property
    def kind(self) -> str:
        """`python-stdlib`, or what the files are: `text`, `parquet`, `jsonl` and so on, joined by `+` if several."""
        if self.name == PYTHON_STDLIB:
            return PYTHON_STDLIB
        return "+".join(sorted({file_kind(file) or TEXT for file in self.files}))


Source = FileSource | HubSource


def resolve_source(source: str | Mapping[str, Any]) -> Source:
    """Find what a source stands for.

    Args:
        source: `python-stdlib`, a file, a folder (every file of a known suffix below it, hidden ones and settings in
            .json apart), a glob,
            a dataset of the hub as `hf:NAME?config=C&split=S&field=F`, with any fields of `HubSource`; or a mapping
            with `path` and perhaps `field`, or with `hub` and perhaps the other fields of `HubSource`, and in either
            perhaps `template` in place of `field`.

    Raises:
        DataError: nothing there, no file of a known suffix, a file of an unknown one, an unknown key, or a template
            that is none or has no rows to fill it.
    """
    if isinstance(source, str):
        return parse_name(source) if source.startswith(PREFIX) else _resolve_path(source, None)
    if "template" not in source:
        return _resolve_mapping(source)
    values = dict(source)
    template = convert(f"source {values!r}: template", values.pop("template"), str, DataError)
    found = _resolve_mapping(values)
    if found.field is not None:
        raise DataError(f"source {found.name!r}: expected either the key field or the key template")
    if isinstance(found, FileSource) and not set(found.kind.split("+")) <= set(ROW_KINDS):
        raise DataError(
            f"source {found.name!r}: expected .parquet, .jsonl, .json or .csv with a template, for its fields"
        )
    check_template(f"source {found.name!r}", template)
    return replace(found, template=template)


def _resolve_mapping(source: Mapping[str, Any]) -> Source:
    values = dict(source)
    kinds = [key for key in ("hub", "path") if key in values]
    if len(kinds) != 1:
        raise DataError(f"source {dict(source)!r}: expected either the key hub or the key path")
    (kind,) = kinds
    name = convert(f"source {dict(source)!r}: {kind}", values.pop(kind), str, DataError)
    if kind == "hub":
        return make_source(name, values, PREFIX + name)
    if unknown := [key for key in values if key != "field"]:
        raise DataError(f"source {name!r}: unknown key {unknown[0]!r}, expected beside path only field or template")
    return _resolve_path(name, convert(f"source {name!r}: field", values.get("field"), str | None, DataError))


def check_different(sources: Sequence[Source]) -> None:
    """Check that no text is named twice, so that none is trained on twice as often as the others unawares.

    Raises:
        DataError: two sources are the same dataset, or have a file in common.
    """
    owners: dict[object, str] = {}
    for source in sources:
        parts: tuple[object, ...] = (
            tuple(file.resolve() for file in source.files)
            if isinstance(source, FileSource)
            else (replace(source, dataset=str(source.folder or source.dataset), streaming=True),)
        )
        for part in parts:
            if part in owners:
                what = part if isinstance(part, Path) else "it"
                raise DataError(f"sources {owners[part]!r} and {source.name!r}: {what} is in both, expected each once")
        owners |= dict.fromkeys(parts, source.name)


def _resolve_path(name: str, field: str | None) -> FileSource:
    if name == PYTHON_STDLIB:
        return FileSource(name, tuple(_stdlib_files()))
    path = user_path(name)
    if name and path.exists():  # an empty name, as an unset variable leaves it, would be the folder of the process
        found = [path]
    elif glob.has_magic(name):
        found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
    else:
        raise DataError(
            f"source {name!r} does not exist: expected a file, a folder, a glob or {PYTHON_STDLIB!r}, or {PREFIX}NAME "
            "for a dataset of the hub"
        )
    files, left_out = _expand(found)
    if not files:
        raise DataError(f"source {name!r} has no files to read: expected {known_suffixes()}")
    return FileSource(name, files, field, left_out=left_out)


def file_source(path: Path) -> FileSource:
    """One file as a source; if its suffix is not known, it is taken for text.

    Raises:
        DataError: no such file.
    """
    file = user_path(path)
    if not file.is_file():
        raise DataError(f"{path} does not exist: expected a file" if not file.exists() else f"{path}: expected a file")
    return FileSource(str(path), (file.absolute(),))


def _expand(found: Sequence[Path]) -> tuple[tuple[Path, ...], tuple[tuple[str, int], ...]]:
    """The files that were named and those below folders that were named, each once; and what is left out, counted."""
    files: dict[Path, Path] = {}
    left_out: Counter[str] = Counter()
    for path in found:
        if not path.is_dir() and file_kind(path) is None:
            raise DataError(f"{path} has the unknown suffix {path.suffix!r}: expected {known_suffixes()}")
        for file in _walk(path) if path.is_dir() else [path]:
            # A recursive glob matches a folder and the files in it, and a link what it leads to.
            if path.is_dir() and not _is_data(file):
                left_out[file.suffix.lower() or "no suffix"] += 1
            else:
                files.setdefault(file.resolve(), file.absolute())
    return tuple(files.values()), tuple(sorted(left_out.items()))


def _is_data(file: Path) -> bool:
    """Whether a file that was found in a folder is to be read.

    Raises:
        DataError: a link that leads nowhere.
    """
    kind = file_kind(file)
    if kind is not None and not file.exists():
        raise DataError(f"{file} is a link to {file.readlink()}, which does not exist")
    return kind is not None and (kind != JSON or holds_rows(file))


def _walk(root: Path, skipped_folders: frozenset[str] = frozenset({"__pycache__"})) -> list[Path]:
    """All files below a folder and the folders that are linked there, hidden ones apart, sorted by relative path."""
    files: list[Path] = []
    seen: set[Path] = set()
    for folder, names, leaves in os.walk(root, followlinks=True):
        if (real := Path(folder).resolve()) in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if name not in skipped_folders and not name.startswith("."))
        files += [Path(folder, leaf) for leaf in leaves if not leaf.startswith(".")]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _stdlib_files() -> list[Path]:
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    root = Path(sysconfig.get_path("stdlib")).resolve()
    files = [file for file in _walk(root, frozenset(skipped)) if file.suffix == ".py"]
    if not files:
        raise DataError(f"source {PYTHON_STDLIB!r} is empty: no *.py files in {root}")
    return files
