"""Benchmarks from a folder of files: what the YAML in `tasks` reads (docs/evaluation.md describes the layout).

The harness calls `load` by the name that stands in the YAML; nothing here needs the harness.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thoughtbubbles.data.sources.corpora import resolve_source
from thoughtbubbles.data.sources.formats import Row
from thoughtbubbles.data.sources.hub import missing_field
from thoughtbubbles.data.sources.reading import read_rows, read_texts
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.files import user_path

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SUFFIXES = (".parquet", ".jsonl")
# The second half of a caption: what follows a sentence (or its number) and starts small.
CAPTION = re.compile(r'(?<=[.!?"\d]) ([a-z][^.!?]*)$')


def find_file(data_dir: str | Path, stem: str) -> Path:
    """The file of a benchmark's split.

    Args:
        data_dir: the folder.
        stem: the file's name, with its suffix or without.

    Raises:
        DataError: no such folder or file.
    """
    folder = user_path(data_dir)
    if not folder.is_dir():
        raise DataError(f"--data-dir {folder}: expected a folder with the files of the tasks")
    names = [stem] if Path(stem).suffix else [stem + suffix for suffix in SUFFIXES]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"--data-dir {folder}: expected {' or '.join(names)} in it")


def load(
    data_dir: str | None = None,
    files: dict[str, str] | None = None,
    hub: tuple[str, str] | None = None,
    **fields: Any,
) -> "DatasetDict":
    """The splits of a benchmark, as the harness wants them.

    Args:
        data_dir: the folder.
        files: the file's name of each split.
        hub: a dataset of the hub and its configuration, which have the documents where there is no folder.
        fields: `fields`, the names of columns that there must be; the harness adds what else it knows.

    Raises:
        DataError: no folder, a missing file, a missing field.
    """
    from datasets import DatasetDict, load_dataset

    if data_dir is None and hub is not None:
        return load_dataset(*hub)
    if data_dir is None:
        raise DataError("data_dir is missing: expected the folder of the tasks, as in --metadata data_dir=FOLDER")
    needed = fields.get("fields", ())
    return DatasetDict({split: _read(find_file(data_dir, stem), needed) for split, stem in (files or {}).items()})


def _read(path: Path, needed: tuple[str, ...]) -> "Dataset":
    from datasets import Dataset

    rows: list[Row] = wikitext_pages(path) if path.suffix == ".txt" else list(read_rows(resolve_source(str(path))))
    if not rows:
        raise DataError(f"{path} has no rows")
    for field in needed:
        if any(field not in row for row in rows):
            number, row = next((number, row) for number, row in enumerate(rows, 1) if field not in row)
            raise missing_field(f"{path}, row {number}", field, list(row))
    return Dataset.from_list(rows)


def wikitext_pages(path: Path) -> list[Row]:
    """The pages of a WikiText file, cut before each title as the hub's document-level data set is."""
    pages: list[list[str]] = [[]]
    for line in "".join(read_texts(path)).split("\n"):
        marks = line.replace("= = =", "===").replace("= =", "==").strip()
        if marks.startswith("= ") and marks.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    texts = ["\n".join(page) for page in pages]
    return [{"page": text} for text in texts if text.strip()]


def hellaswag_documents(dataset: "Dataset") -> "Dataset":
    """What the harness makes of a HellaSwag row, from one whose context is already joined and cleaned.

    The harness capitalises the second half of a caption, which the joined context holds as it was: `... he`.
    """

    from datasets import Dataset

    def document(row: Row) -> Row:
        query = CAPTION.sub(lambda half: " " + str(half[1]).capitalize(), str(row["ctx"]))
        return {**row, "query": query, "choices": row["endings"], "gold": int(row["label"])}

    return Dataset.from_list([document(row) for row in dataset])
