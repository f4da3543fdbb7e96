"""A network that dies is nobody's bad input: exit code 1, and what is done stays for the next call."""

import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx
import pytest
import requests
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from tests.data.conftest import hub_folder, make_texts
from tests.data.preparation.test_prepare import content, leftovers
from thoughtbubbles import cli
from thoughtbubbles.data import DataError, SourceError, UnfinishedError
from thoughtbubbles.data.preparation import shards
from thoughtbubbles.data.sources import formats
from thoughtbubbles.data.sources.corpora import resolve_source
from thoughtbubbles.data.sources.hub import HubReader, parse_name
from thoughtbubbles.data.sources.reading import open_documents, read_documents
from thoughtbubbles.data.tokenizer import load_data_tokenizer
from thoughtbubbles.model.loading import load_tokenizer
from thoughtbubbles.support.errors import InputError, RunError, is_network

NOTHING = httpx.Request("GET", "https://hub")


def because(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def status(code: int) -> Exception:
    return httpx.HTTPStatusError(f"{code}", request=NOTHING, response=httpx.Response(code, request=NOTHING))


NETWORK = [
    ConnectionError("Couldn't reach the hub"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    TimeoutError("timed out"),
    httpx.ReadTimeout("slow"),
    httpx.ConnectError("no route"),
    requests.exceptions.ChunkedEncodingError("cut"),
    requests.exceptions.ConnectTimeout("slow"),
    status(503),
    because(DatasetGenerationError("An error occurred while generating the dataset"), httpx.RemoteProtocolError("cut")),
]
ABSENT = [
    DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
    because(DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), status(404)),
    ValueError("BuilderConfig 'x' not found. Available: ['y']"),
    FileNotFoundError("Couldn't find any data file"),
]


@pytest.mark.parametrize("error", NETWORK, ids=lambda error: type(error).__name__)
def test_a_network_that_fails_is_no_bad_input(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_network(error)

    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UnfinishedError, match=r"^source 'hf:a/b' cannot be loaded: \S") as caught:
        HubReader(parse_name("hf:a/b"))
    assert caught.value.exit_code == RunError.exit_code == 1
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize("error", ABSENT, ids=lambda error: type(error).__name__)
def test_a_name_that_is_not_there_is_bad_input(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SourceError, match=r"^source 'hf:a/b' cannot be loaded: \S") as caught:
        HubReader(parse_name("hf:a/b"))
    assert caught.value.exit_code == InputError.exit_code == 2
    assert not isinstance(caught.value, RunError)


def test_what_was_turned_off_has_not_failed() -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    assert not is_network(OfflineModeIsEnabled("offline"))
    assert not is_network(because(OSError("We couldn't connect"), OfflineModeIsEnabled("offline")))
    assert is_network(because(OSError("We couldn't connect"), httpx.ConnectError("no route")))
    assert not is_network(None)


@pytest.mark.parametrize(
    ("error", "kind"), [(httpx.ConnectError("no route"), UnfinishedError), (ValueError("not one"), DataError)]
)
def test_a_tokenizer_that_cannot_be_fetched(
    error: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def load(*_: Any, **__: Any) -> Any:
        raise because(OSError("We couldn't connect to the hub"), error)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    with pytest.raises(kind, match="cannot be loaded by AutoTokenizer"):
        load_data_tokenizer("a/b")


@pytest.mark.parametrize(
    ("error", "kind"), [(httpx.ConnectError("no route"), RunError), (ValueError("not one"), InputError)]
)
def test_a_model_that_cannot_be_fetched(
    error: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def load(*_: Any, **__: Any) -> Any:
        raise because(OSError("We couldn't connect to the hub"), error)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    with pytest.raises(kind, match=r"model a/b.*: We couldn't connect to the hub"):
        load_tokenizer("a/b")


def dying(monkeypatch: pytest.MonkeyPatch, rows: int, error: Exception) -> None:
    """Let every reading of a dataset die after so many rows."""
    read = HubReader._from

    def cut(reader: HubReader, start: dict[str, Any] | None) -> Iterator[Any]:
        for number, row in enumerate(read(reader, start)):
            if number == rows:
                raise error
            yield row

    monkeypatch.setattr(HubReader, "_from", cut)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *((error, UnfinishedError) for error in NETWORK),
        (OSError(errno.EIO, "Input/output error"), UnfinishedError),
        (EOFError("Compressed file ended before the end-of-stream marker was reached"), SourceError),
        (ValueError("not JSON"), SourceError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_folder_is_at_fault_only_where_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    folder = hub_folder(tmp_path / "hub", {("c", "train", 0): ["one", "two", "three"]}, "text")
    dying(monkeypatch, 2, error)
    documents = open_documents(resolve_source(f"hf:{folder}"), "text").documents()
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(kind, match="cannot be read further: "):
        next(documents)


def test_prepare_goes_on_after_the_network_died(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts: list[str | None] = [*make_texts(30, seed=4)]
    folder = hub_folder(tmp_path / "hub", {("c", "train", 0): texts}, "text")
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)
    monkeypatch.setattr("thoughtbubbles.data.tokenizer.BATCH_CHARACTERS", 700)
    options = [f"hf:{folder}", "--tokenizer", str(tokenizer_folder), "--block-size", "16", "--quiet", "--num-proc", "1"]

    def prepare(output: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["thoughtbubbles", "prepare", str(output), *options])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(str(end.value.code))

    assert prepare(tmp_path / "whole") == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        dying(patch, 25, ConnectionError("the line is dead"))
        assert prepare(tmp_path / "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f"cannot be read further: the line is dead; what is done stays in {tmp_path / '.out.partial'}, the same call "
        "goes on"
    )
    done = list((tmp_path / ".out.partial" / "shards").iterdir())
    assert len(done) > 1
    with monkeypatch.context() as patch:
        dying(patch, 12, AssertionError("what was done is read again"))
        assert prepare(tmp_path / "out") == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert leftovers(tmp_path) == ["hub", "out", "whole"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), UnfinishedError),
        (ConnectionResetError(errno.ECONNRESET, "reset"), UnfinishedError),
        (PermissionError(errno.EACCES, "Permission denied"), SourceError),
        (OSError("Couldn't deserialize thrift: don't know what type"), SourceError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: OSError, kind: type[Exception]
) -> None:
    (tmp_path / name).write_text('{"text": "a"}\n')
    source = resolve_source(str(tmp_path / name))

    def unreadable(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(formats, "open", unreadable, raising=False)
    with pytest.raises(kind, match=rf"cannot read .*{name}: "):
        list(read_documents(source, "text"))


@pytest.mark.parametrize("deep", ["[" * 200_000, '{"text":' * 200_000], ids=["lists", "objects"])
def test_rows_that_are_nested_deeply_are_one_line(tmp_path: Path, deep: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + deep + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is not JSON that can be read: maximum recursion depth"):
        list(read_documents(resolve_source(str(tmp_path / "a.jsonl")), "text"))
