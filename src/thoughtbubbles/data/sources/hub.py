"""Datasets of the Hugging Face hub as sources, or folders laid out like them: names, loading, rows in order."""

import copy
import glob
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

from thoughtbubbles.recipes.values import convert
from thoughtbubbles.support.errors import (
    DataError,
    SourceError,
    UnfinishedError,
    as_os_error,
    is_network,
    is_path_error,
    one_line,
)
from thoughtbubbles.support.files import user_path

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

PREFIX = "hf:"
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Not datasets but ways to read files.
FORMATS = ("json", "parquet", "csv", "text", "arrow")
TRUE_OR_FALSE = {"true": True, "false": False}


@dataclass(frozen=True)
class HubSource:
    """A dataset of the hub, or a folder that `datasets.load_dataset` reads.

    Attributes:
        dataset: its name on the hub, or the path of the folder.
        config: its configuration; None where it has but one.
        split: the split to read.
        field: the field of its rows that holds the text; None is the one of the whole preparation.
        streaming: read it from the network as it is needed, and keep nothing; otherwise it is downloaded first.
        revision: the branch, tag or commit; None is the newest.
        data_files: the files to read, a path or glob within the dataset; None is all. With a format such as `json` as
            the dataset, any path or address, as in hf://datasets/NAME/FOLDER/*.json.gz.
        template: of Jinja over the fields of a row, in place of `field`. Names leave it out: only a mapping has one.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    field: str | None = None
    streaming: bool = True
    revision: str | None = None
    data_files: str | None = None
    template: str | None = None

    @property
    def name(self) -> str:
        """The source in one string, as `parse_name` reads it; what has its default value is left out."""
        given = {key: value for key in KEYS if (value := getattr(self, key)) != DEFAULTS[key]}
        words = {key: str(value).lower() if isinstance(value, bool) else value for key, value in given.items()}
        return PREFIX + self.dataset + ("?" + urlencode(words, safe="/*:") if words else "")

    @property
    def kind(self) -> str:
        """The word `hub`."""
        return "hub"

    @property
    def folder(self) -> Path | None:
        """The folder that holds the dataset; None if it is on the hub."""
        path = user_path(self.dataset)
        return path.resolve() if path.is_dir() else None

    def files(self) -> tuple[Path, ...]:
        """The files of a local folder, or local files that were named, sorted; none for a dataset on the hub."""
        if self.folder is None:
            return tuple(Path(name).resolve() for name in sorted(glob.glob(_at_home(self.data_files) or "")))  # noqa: PTH207
        found = (Path(folder, leaf) for folder, _, leaves in os.walk(self.folder) for leaf in leaves)
        return tuple(sorted(file for file in found if not _is_hidden(file.relative_to(self.folder))))


DEFAULTS = {spec.name: spec.default for spec in fields(HubSource)}
KEYS = tuple(key for key in DEFAULTS if key not in ("dataset", "template"))


def parse_name(name: str) -> HubSource:
    """Read `hf:NAME?config=C&split=S&field=F&streaming=true&revision=R&data_files=G`; all after NAME may be left out.

    Raises:
        DataError: an unknown key, a value that cannot be used, or no such folder.
    """
    dataset, mark, query = name.removeprefix(PREFIX).partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(mark))
    except ValueError:
        raise DataError(f"source {name!r}: expected key=value after the question mark, joined by &") from None
    values: dict[str, Any] = dict(pairs)
    if "streaming" in values:
        values["streaming"] = TRUE_OR_FALSE.get(values["streaming"], values["streaming"])
    return make_source(dataset, values, name)


def make_source(dataset: str, values: Mapping[str, Any], name: str) -> HubSource:
    """A source from a dataset's name and the other fields of `HubSource`.

    Args:
        dataset: name on the hub, or path of a folder.
        values: what is not to have its default value.
        name: the source as the user wrote it, for the errors.

    Raises:
        DataError: an unknown key, a value that cannot be used, or no such folder.
    """
    for key, value in values.items():
        if key not in KEYS:
            raise DataError(f"source {name!r}: unknown key {key!r}, expected some of {', '.join(KEYS)}")
        convert(f"source {name!r}: {key}", value, bool if key == "streaming" else str, DataError)
        if value == "":
            raise DataError(f"source {name!r}: {key} is empty, expected a value")
    if dataset in FORMATS and "data_files" not in values:
        raise DataError(f"source {name!r}: expected data_files, since {dataset} is a format of files")
    source = HubSource(dataset, **values)
    if not dataset or (source.folder is None and not NAME.fullmatch(dataset)):
        raise DataError(f"source {name!r}: {dataset!r} is not a folder, and no name of a dataset on the hub")
    return source


def newest_commit(source: HubSource) -> str | None:
    """The commit at which the hub has the dataset now; None for a folder, or if the hub does not say."""
    if source.folder is not None or source.dataset in FORMATS:
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.dataset, revision=source.revision).sha
    except Exception:  # whatever is wrong, the loading that follows says it in its own words
        return None


class HubReader:
    """The rows of a hub source in order.

    Args:
        source: the source.
        progress: show the library's bars of a download.

    Raises:
        SourceError: a name, configuration or split that is not there.
        UnfinishedError: a hub that cannot be reached.
    """

    def __init__(self, source: HubSource, progress: bool = False) -> None:
        self._source = source
        self._name = source.name
        self._streaming = source.streaming
        self._rows = _load(source, progress)
        self._index = 0

    def keep_only(self, field: str) -> None:
        """Read no other field.

        Raises:
            DataError: the field is not there, or holds something else than text, as far as the dataset says before
                it is read.
        """
        features = self._rows.features
        if features is None:
            return
        if field not in features:
            raise missing_field(f"source {self._name!r}", field, list(features))
        kind = getattr(features[field], "dtype", type(features[field]).__name__)
        if kind not in ("string", "large_string", "string_view"):
            raise DataError(f"source {self._name!r}: field {field!r} holds {kind}, expected text")
        self._rows = self._rows.select_columns([field])

    def shards(self) -> int:
        """How many files, or parts that the dataset names, a stream is read from."""
        return int(self._rows.num_shards)

    def shard(self, number: int) -> "HubReader":
        """A reader of one of them."""
        one = copy.copy(self)
        one._rows, one._index = self._rows.shard(self.shards(), number), 0
        return one

    def rows(self, start: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """The rows from a place on.

        Args:
            start: what `position` of a reader of the same source gave; None is the first row.

        Raises:
            SourceError: the files of a folder cannot be read further.
            UnfinishedError: the network or the disk stopped the reading.
        """
        try:
            with closing(iter(self._from(start))) as rows:
                for row in rows:
                    self._index += 1
                    yield row
        except Exception as error:  # network, decompression and format errors of many libraries
            raise _failure(self._source, "cannot be read further", error) from error

    def _from(self, start: dict[str, Any] | None) -> "Dataset | IterableDataset":
        self._index = 0
        if start is None:
            return self._rows
        if self._streaming:
            self._rows.load_state_dict(start["state"])
            return self._rows
        self._index = start["index"]
        # The library refuses an empty range at the end.
        return self._rows.select(range(self._index, len(self._rows)) or [])

    def position(self) -> dict[str, Any]:
        """Where the last row given ends, as JSON can hold it."""
        return {"state": self._rows.state_dict()} if self._streaming else {"index": self._index}


def missing_field(place: str, field: str, fields_there: list[str]) -> DataError:
    """The error for rows without the field; it names those that they have."""
    return DataError(f"{place} has no field {field!r}: it has {', '.join(map(repr, fields_there)) or 'no fields'}")


def _at_home(name: str | None) -> str | None:
    """A path or address with the home folder for a leading `~`."""
    return str(user_path(name)) if name is not None and name.startswith("~") else name


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _load(source: HubSource, progress: bool) -> "Dataset | IterableDataset":
    import datasets

    try:
        with quiet_datasets(not progress):
            return datasets.load_dataset(
                str(source.folder or source.dataset),
                source.config,
                split=source.split,
                streaming=source.streaming,
                revision=source.revision,
                data_files=_at_home(source.data_files),
            )
    except Exception as error:  # the library raises a dozen kinds for an unknown name, config, split or network
        raise _failure(source, "cannot be loaded", error) from error


def _failure(source: HubSource, what: str, error: Exception) -> SourceError | UnfinishedError:
    """What the library's error means: a source at fault where it is local or was never there, else the network."""
    absent = what == "cannot be loaded" and isinstance(error, FileNotFoundError | ValueError)
    found = as_os_error(error)
    stopped = is_network(error) or (found is not None and found.errno is not None and not is_path_error(found))
    hurt = not stopped and (absent or source.folder is not None)
    kind: type[SourceError | UnfinishedError] = SourceError if hurt else UnfinishedError
    return kind(f"source {source.name!r} {what}: {one_line(error)}")


@contextmanager
def quiet_datasets(quiet: bool = True) -> Iterator[None]:
    """Turn the progress bars of the datasets library off for a while."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
