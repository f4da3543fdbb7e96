"""An interrupted preparation goes on where it stopped, and ends as if nothing had been."""

import errno
import fcntl
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.conftest import hub_folder, make_texts, write_folder
from tests.data.preparation.test_prepare import content, leftovers, prepare
from thoughtbubbles.data import DataError, Manifest, SourceError, UnfinishedError, load_prepared
from thoughtbubbles.data.preparation import prepare as preparation
from thoughtbubbles.data.preparation import shards, stages, survey
from thoughtbubbles.data.preparation.shards import ShardStore
from thoughtbubbles.data.preparation.tokenising import Tokeniser
from thoughtbubbles.data.preparation.workfolder import publish
from thoughtbubbles.data.sources.reading import open_documents

TEXTS = make_texts(40, seed=9)


class Stop(BaseException):
    """Stops the work as a signal would."""


@pytest.fixture(autouse=True)
def _small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 5000)
        patch.setattr("thoughtbubbles.data.tokenizer.BATCH_CHARACTERS", 700)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every kind of source, with rows that are skipped at their ends and in between."""
    folder = tmp_path_factory.mktemp("sources")
    texts = write_folder(folder / "texts", ["", *TEXTS[:8], "", ""])
    pq.write_table(pa.table({"text": [*TEXTS[8:16], None]}), folder / "x.parquet", row_group_size=3)
    (folder / "x.jsonl").write_text("\n\n".join(json.dumps({"text": text}) for text in ["", *TEXTS[16:24]]))
    parts: dict[tuple[str, str, int], list[str | None]] = {
        ("c", "train", 0): [*TEXTS[24:28], None],
        ("c", "train", 1): [None, *TEXTS[28:32]],
        ("c", "test", 0): [*TEXTS[32:40]],
    }
    hub = hub_folder(folder / "hub", parts, "text")
    return [str(texts), str(folder / "x.parquet"), str(folder / "x.jsonl"), f"hf:{hub}", f"hf:{hub}?split=test"]


@pytest.fixture
def options(tokenizer_folder: Path) -> dict[str, Any]:
    return {"tokenizer": str(tokenizer_folder), "num_proc": 2}


@pytest.fixture
def expected(tmp_path: Path, sources: list[str], options: dict[str, Any]) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 1 << 30)
        prepare(tmp_path / "expected", sources, **options)
    return content(tmp_path / "expected")


def stop_after_appending(patch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Raise when so many pieces of documents have been appended to shards."""
    append = shards.ShardWriter.append
    left = count

    def stopping(writer: shards.ShardWriter, tokens: Any) -> None:
        nonlocal left
        if left == 0:
            raise error
        left -= 1
        append(writer, tokens)

    patch.setattr(shards.ShardWriter, "append", stopping)


@pytest.mark.parametrize("num_proc", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3000, 100_000])
def test_shards_and_threads_change_nothing(
    tmp_path: Path,
    sources: list[str],
    options: dict[str, Any],
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    num_proc: int,
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", size)
    prepare(tmp_path / "out", sources, **{**options, "num_proc": num_proc})
    assert content(tmp_path / "out") == expected
    assert leftovers(tmp_path) == ["expected", "out"]


@pytest.mark.parametrize("num_proc", [1, 3])
def test_shard_borders_do_not_depend_on_threads(
    tmp_path: Path, sources: list[str], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, num_proc: int
) -> None:
    monkeypatch.setattr(stages, "split_documents", lambda *_, **__: (_ for _ in ()).throw(Stop))
    limit = {"limit_tokens": 1500}
    for name, threads in (("a", num_proc), ("b", 2)):
        with pytest.raises(Stop):
            prepare(tmp_path / name, sources, **{**options, **limit, "num_proc": threads})
    ours, theirs = (content(tmp_path / f".{name}.partial" / "shards") for name in ("a", "b"))
    assert len(ours) > 9
    assert ours == theirs


def test_interruption_at_every_shard_border(
    tmp_path: Path,
    sources: list[str],
    options: dict[str, Any],
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill = Tokeniser._fill
    filled = 0

    def fill_one(*arguments: Any) -> Any:
        nonlocal filled
        filled += 1
        if filled == 2:
            raise Stop
        return fill(*arguments)

    monkeypatch.setattr(Tokeniser, "_fill", fill_one)
    starts = 0
    while not (tmp_path / "out").exists():
        filled, starts = 0, starts + 1
        with suppress(Stop):
            prepare(tmp_path / "out", sources, **options)
        assert not list((tmp_path / ".out.partial").glob("shards/.*"))
    assert starts > 8
    assert content(tmp_path / "out") == expected
    assert leftovers(tmp_path) == ["expected", "out"]


@given(stops=st.lists(st.integers(0, 25), max_size=4), size=st.sampled_from([1, 2500, 6000]), limit=st.booleans())
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_interruptions_inside_shards_change_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    sources: list[str],
    options: dict[str, Any],
    stops: list[int],
    size: int,
    limit: bool,
) -> None:
    folder = tmp_path_factory.mktemp("stops")
    both = {**options, "limit_tokens": 1200 if limit else None}
    prepare(folder / "expected", sources, **both)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", size)
        for count in stops:
            with pytest.MonkeyPatch.context() as inner:
                stop_after_appending(inner, count, Stop())
                with suppress(Stop):
                    prepare(folder / "out", sources, **both)
        prepare(folder / "out", sources, **both)
    assert content(folder / "out") == content(folder / "expected")
    assert leftovers(folder) == ["expected", "out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize(
    "step",
    [
        (survey, "train_tokenizer"),
        (survey.Survey, "write"),
        (stages, "tokenizer_hash"),
        (stages, "pack"),
        (stages, "_save_blocks"),
        (preparation, "publish"),
        (Manifest, "write"),
    ],
    ids=lambda step: step[1],
)
def test_interruption_of_every_step_with_a_trained_tokenizer(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str], error: Any
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(*step, fail)
    expected = UnfinishedError if isinstance(error, OSError) else error
    for _ in range(2):
        with pytest.raises(expected):
            prepare(tmp_path / "out", sources[:3])
    kept = step[1] != "write" or step[0] is Manifest
    assert leftovers(tmp_path) == ([".out.partial"] if kept else [])
    monkeypatch.undo()
    if kept:
        # What was surveyed is not surveyed again.
        monkeypatch.setattr(stages, "survey_sources", None)
    prepare(tmp_path / "out", sources[:3])
    monkeypatch.undo()
    prepare(tmp_path / "expected", sources[:3])
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert leftovers(tmp_path) == ["expected", "out"]


def test_the_old_folder_stays_until_the_new_one_is_there(
    tmp_path: Path, sources: list[str], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(tmp_path / "out", sources, **options)
    with pytest.MonkeyPatch.context() as patch:
        stop_after_appending(patch, 20, Stop())
        with pytest.raises(Stop):
            prepare(tmp_path / "out", sources, seed=1, overwrite=True, **options)
    assert load_prepared(tmp_path / "out").manifest == first
    # Killed between the two renamings: the old folder is in the work folder, and the output is absent.
    (tmp_path / "out").rename(tmp_path / ".out.partial" / "old")
    with pytest.raises(DataError, match="expected a new path, or overwrite"):
        prepare(tmp_path / "out", sources, seed=1, **options)
    assert load_prepared(tmp_path / "out").manifest == first
    assert prepare(tmp_path / "out", sources, seed=1, overwrite=True, **options).seed == 1
    assert leftovers(tmp_path) == ["out"]


def test_work_that_is_left_when_the_output_is_there_is_removed(
    tmp_path: Path, sources: list[str], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:

    def publish_and_die(*arguments: Any) -> None:
        publish(*arguments)
        raise Stop

    monkeypatch.setattr(preparation, "publish", publish_and_die)
    with pytest.raises(Stop):
        prepare(tmp_path / "out", sources, **options)
    assert leftovers(tmp_path) == [".out.partial", "out"]
    prepare(tmp_path / "out", sources, **options)
    assert leftovers(tmp_path) == ["out"]
    # The work of another job, interrupted, is not touched.
    interrupt(tmp_path, sources, seed=8, overwrite=True, **options)
    prepare(tmp_path / "out", sources, **options)
    assert leftovers(tmp_path) == [".out.partial", "out"]


def interrupt(folder: Path, sources: list[str], **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after_appending(patch, 20, Stop())
        with pytest.raises(Stop):
            prepare(folder / "out", sources, **options)


def test_what_was_read_is_not_read_again(
    tmp_path: Path, sources: list[str], options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    end_document = shards.ShardWriter.end_document

    def counting(*arguments: Any) -> Any:
        seen.append(1)
        return end_document(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.ShardWriter, "end_document", counting)
        stop_after_appending(patch, 36, Stop())
        with pytest.raises(Stop):
            prepare(tmp_path / "out", sources, **options)
    assert len(seen) == 36
    store = ShardStore(tmp_path / ".out.partial" / "shards", np.dtype("uint16"))
    kept = sum(reading.documents for reading in store.readings(5))
    assert 30 < kept <= 36
    assert store.place.source == 4
    seen.clear()
    # Nothing of the sources that are done is opened, and of the stream only what follows is read.
    opened: list[str] = []

    def opening(source: Any, *arguments: Any) -> Any:
        opened.append(source.name)
        return open_documents(source, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.ShardWriter, "end_document", counting)
        patch.setattr(stages, "open_documents", opening)
        capsys.readouterr()
        prepare(tmp_path / "out", sources, **options, progress=True)
    assert len(seen) == 40 - kept
    assert opened == [sources[4]]
    assert f"found {kept} documents and " in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"seed": 5}, {"limit_tokens": 9999}, {"sources": 4}, {"streaming": False}], ids=str)
def test_work_of_another_job_is_removed_with_a_line(
    tmp_path: Path,
    sources: list[str],
    options: dict[str, Any],
    change: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt(tmp_path, sources, **options)
    count = change.pop("sources", 5)
    names = [*sources[:count]]
    if "streaming" in change:
        change.pop("streaming")
        names[3] += "?streaming=false"
    prepare(tmp_path / "out", names, **options, **change, progress=True)
    assert "holds the start of another preparation, of other sources or options: removed" in capsys.readouterr().err
    prepare(tmp_path / "expected", names, **options, **change)
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert leftovers(tmp_path) == ["expected", "out"]


def test_bad_input_after_an_interruption_leaves_nothing(
    tmp_path: Path, sources: list[str], options: dict[str, Any]
) -> None:
    large = {**options, "block_size": 1_000_000}
    interrupt(tmp_path, sources, **large)
    assert leftovers(tmp_path) == [".out.partial"]
    with pytest.raises(DataError, match="too few for one block of 1000000"):
        prepare(tmp_path / "out", sources, **large)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"out cannot be written: No space left on device; what is"),
        (UnfinishedError("source 'x' cannot be read further: gone"), r"^source 'x' cannot be read further: gone; what"),
        (SourceError("source 'x' cannot be read further: hurt"), r"^source 'x' cannot be read further: hurt; what"),
    ],
    ids=["disk", "network", "source"],
)
def test_a_full_disk_a_lost_network_and_a_hurt_source_are_one_line_and_keep_what_is_done(
    tmp_path: Path,
    sources: list[str],
    options: dict[str, Any],
    expected: dict[str, bytes],
    error: Exception,
    message: str,
) -> None:
    kind = SourceError if isinstance(error, SourceError) else UnfinishedError
    for count, end in ((0, None), (25, ".out.partial")):
        with pytest.MonkeyPatch.context() as patch:
            stop_after_appending(patch, count, error)
            with pytest.raises(kind, match=message if end else message.partition("; ")[0]) as caught:
                prepare(tmp_path / "out", sources, **options)
        assert "\n" not in str(caught.value)
        assert leftovers(tmp_path) == [*([end] if end else []), "expected"]
    assert str(caught.value).endswith("the same call goes on")
    prepare(tmp_path / "out", sources, **options)
    assert content(tmp_path / "out") == expected


def test_a_damaged_shard_is_made_again(
    tmp_path: Path, sources: list[str], options: dict[str, Any], expected: dict[str, bytes]
) -> None:
    interrupt(tmp_path, sources, **options)
    with (tmp_path / ".out.partial" / "shards" / "000001" / "tokens").open("ab") as file:
        file.write(b"xx")
    prepare(tmp_path / "out", sources, **options)
    assert content(tmp_path / "out") == expected


def test_a_second_process_is_refused(tmp_path: Path, sources: list[str], options: dict[str, Any]) -> None:
    interrupt(tmp_path, sources, **options)
    before = content(tmp_path)
    with (tmp_path / ".out.partial" / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"output .*out is being prepared by another process"):
            prepare(tmp_path / "out", sources, **options)
    assert content(tmp_path) == before
    prepare(tmp_path / "out", sources, **options)
    assert leftovers(tmp_path) == ["out"]


def test_a_dataset_that_changes_on_the_hub_is_read_on_at_its_commit(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub_folder(tmp_path / "hub", {("c", "train", 0): [*TEXTS]}, "text")
    load, revisions, newest = datasets.load_dataset, [], ["abc", "def"]

    def load_folder(name: str, *arguments: Any, revision: str | None, **rest: Any) -> Any:
        assert name == "some/one"
        revisions.append(revision)
        return load(str(folder), *arguments, **rest)

    def info(_: HfApi, name: str, revision: str | None) -> Any:
        assert (name, revision) == ("some/one", "main")
        return SimpleNamespace(sha=newest.pop(0))

    monkeypatch.setattr(datasets, "load_dataset", load_folder)
    monkeypatch.setattr(HfApi, "dataset_info", info)
    interrupt(tmp_path, ["hf:some/one?revision=main"], **options)
    (record,) = prepare(tmp_path / "out", ["hf:some/one?revision=main"], **options).sources
    assert revisions == ["abc", "abc"]
    assert (record.revision, record.commit, record.name) == ("main", "abc", "hf:some/one?revision=main")


def start(output: Path, source: Path, tokenizer: Path, log: Path) -> int:
    """Prepare slowly in a forked child, which has everything imported; its process id."""
    child = os.fork()
    if child:
        return child
    append, status = shards.ShardWriter.append, 1

    def slowly(writer: shards.ShardWriter, tokens: Any) -> None:
        time.sleep(0.004)
        append(writer, tokens)

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        shards.SHARD_BYTES = 30_000
        setattr(shards.ShardWriter, "append", slowly)  # noqa: B010 - a method
        with log.open("w", buffering=1) as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = file
            both: dict[str, Any] = {"tokenizer": str(tokenizer), "validation_fraction": 0.05}
            prepare(output, [str(source)], **both, num_proc=2, progress=True)
        status = 0
    finally:
        os._exit(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_processes_leave_work_that_goes_on(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_folder(tmp_path / "texts", make_texts(250, seed=4))
    prepare(tmp_path / "expected", [str(source)], tokenizer=str(tokenizer_folder), validation_fraction=0.05)
    work = tmp_path / ".out.partial" / "shards"
    chance = random.Random(0)
    # Killed inside a shard, at a random moment, once more shards are there than the last time.
    log = tmp_path.parent / f"{tmp_path.name}.log"
    for number in (signal.SIGKILL, signal.SIGINT):
        child = start(tmp_path / "out", source, tokenizer_folder, log)
        done = len([*work.glob("[0-9]*")])
        while len([*work.glob("[0-9]*")]) <= done:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), log.read_text()
            time.sleep(0.005)
        time.sleep(chance.random() * 0.05)
        os.kill(child, number)
        _, status = os.waitpid(child, 0)
        assert status != 0
        errors = log.read_text()
        if done:
            assert " documents and " in errors
        if number == signal.SIGINT:
            assert "stopped; what is done stays in" in errors
        assert not (tmp_path / "out").exists()
    prepare(tmp_path / "out", [str(source)], tokenizer=str(tokenizer_folder), validation_fraction=0.05)
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert leftovers(tmp_path) == ["expected", "out", "texts"]
