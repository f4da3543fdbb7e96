import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.utils import are_progress_bars_disabled
from transformers import AutoTokenizer

from tests.data.conftest import make_texts, write_folder
from thoughtbubbles.data import DataError, Manifest, PreparedData, UnfinishedError, load_prepared
from thoughtbubbles.data import prepare as prepare_with_bars
from thoughtbubbles.data.preparation import stages, survey
from thoughtbubbles.data.preparation.manifest import FORMAT_VERSION
from thoughtbubbles.data.sources.corpora import resolve_source

SHARED = Path(__file__).parents[4] / "shared"
SMALL: dict[str, Any] = {"vocab_size": 300, "block_size": 16, "validation_fraction": 0.2}


def prepare(output: Path, sources: list[str], **options: Any) -> Manifest:
    return prepare_with_bars(output, sources, **{**SMALL, "progress": False, **options})


def tokens(prepared: PreparedData, split: str) -> list[int]:
    blocks = getattr(prepared, split)["input_ids"][:]
    return [int(token) for token in blocks.reshape(-1)]


def documents(prepared: PreparedData, split: str) -> list[str]:
    """The text between the separators; the last document may be cut off."""
    tokenizer = prepared.tokenizer()
    ids = tokens(prepared, split)
    starts = [place for place, token in enumerate(ids) if token == tokenizer.eos_token_id]
    assert starts[0] == 0
    return [str(tokenizer.decode(ids[a + 1 : b])) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def leftovers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_blocks_decode_to_the_documents(tmp_path: Path, corpus: str, texts: list[str]) -> None:
    manifest = prepare(tmp_path / "out", [corpus])
    prepared = load_prepared(tmp_path / "out")
    train, validation = documents(prepared, "train"), documents(prepared, "validation")
    assert len(validation) == manifest.validation.documents == 6
    assert len(train) == manifest.train.documents == 24
    # All but the last document of a split are whole.
    assert set(train[:-1]) | set(validation[:-1]) < set(texts)
    for end in (train[-1], validation[-1]):
        assert sum(text.startswith(end.rstrip("\ufffd")) for text in texts) == 1
    assert not set(train) & set(validation)
    assert validation[:-1] == [text for text in texts if text in set(validation[:-1])]
    assert train[:-1] != [text for text in texts if text in set(train[:-1])]


def test_loaded_blocks_are_int64_tensors(tmp_path: Path, corpus: str) -> None:
    manifest = prepare(tmp_path / "out", [corpus])
    prepared = load_prepared(str(tmp_path / "out"))
    assert prepared.manifest == manifest
    assert prepared.train.column_names == ["input_ids"]
    assert prepared.train[0]["input_ids"].dtype == torch.int64
    assert prepared.train[:3]["input_ids"].shape == (3, 16)
    assert prepared.train.features["input_ids"].feature.dtype == "uint16"
    assert len(prepared.train) == manifest.train.blocks
    assert AutoTokenizer.from_pretrained(str(tmp_path / "out" / "tokenizer")).eos_token_id == 0


def test_vocabulary_beyond_32_bits_is_refused(tmp_path: Path, corpus: str, tokenizer_folder: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "huge")
    definition = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    definition["model"]["vocab"]["e"] = 3_000_000_000
    (tmp_path / "huge" / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(DataError, match="the tokenizer has ids up to 3000000000: expected at most 2147483647"):
        prepare(tmp_path / "out", [corpus], tokenizer=str(tmp_path / "huge"))


def test_large_vocabulary_is_stored_as_int32(tmp_path: Path, corpus: str, tokenizer_folder: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "large")
    definition = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    # The most frequent letter gets an id that 16 bits do not hold; the ids below it are free.
    definition["model"]["vocab"]["e"] = 70_000
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(definition))
    manifest = prepare(tmp_path / "out", [corpus], tokenizer=str(tmp_path / "large"))
    prepared = load_prepared(tmp_path / "out")
    assert manifest.vocab_size == 70_001
    assert prepared.train.features["input_ids"].feature.dtype == "int32"
    assert prepared.train[0]["input_ids"].dtype == torch.int64
    assert 70_000 in tokens(prepared, "train")


def test_manifest_adds_up(tmp_path: Path, corpus: str, texts: list[str]) -> None:
    (Path(corpus) / "empty.txt").touch()
    manifest = prepare(tmp_path / "out", [corpus])
    (source,) = manifest.sources
    assert (source.name, source.kind, source.files, source.documents, source.skipped) == (corpus, "text", 31, 30, 1)
    assert source.bytes == sum(len(text.encode()) for text in texts)
    assert manifest.train.bytes + manifest.validation.bytes == source.bytes
    tokenizer = load_prepared(tmp_path / "out").tokenizer()
    encoded = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    assert manifest.train.tokens + manifest.validation.tokens == encoded + 30
    for split in (manifest.train, manifest.validation):
        assert split.tokens == split.blocks * 16 + split.dropped_tokens
        assert split.dropped_tokens < 16
    assert manifest.tokenizer.name == "trained"
    assert manifest.tokenizer.trained_documents == 24
    assert manifest.tokenizer.trained_bytes == manifest.train.bytes
    assert manifest.vocab_size == 300
    assert manifest.format_version == FORMAT_VERSION
    assert manifest.packing == "packed"
    assert {"python", "tokenizers", "datasets"} <= manifest.versions.keys()
    assert Manifest.from_json(manifest.to_json()) == Manifest.read(tmp_path / "out") == manifest


def test_result_does_not_depend_on_num_proc(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thoughtbubbles.data.tokenizer.BATCH_CHARACTERS", 500)
    prepare(tmp_path / "one", [corpus], num_proc=1)
    prepare(tmp_path / "again", [corpus], num_proc=1)
    prepare(tmp_path / "two", [corpus], num_proc=2)
    assert content(tmp_path / "one") == content(tmp_path / "again") == content(tmp_path / "two")


def test_seed_changes_the_split_and_the_order(tmp_path: Path, corpus: str) -> None:
    for seed in (0, 1):
        prepare(tmp_path / str(seed), [corpus], seed=seed)
    first, second = (documents(load_prepared(tmp_path / str(seed)), "validation") for seed in (0, 1))
    assert set(first) != set(second)


def test_named_validation_sources_and_no_leak(tmp_path: Path, corpus: str, texts: list[str]) -> None:
    held_out = [*make_texts(4, seed=5), texts[3]]
    other = write_folder(tmp_path / "other", held_out)
    manifest = prepare(tmp_path / "out", [corpus], validation=[str(other)])
    prepared = load_prepared(tmp_path / "out")
    assert documents(prepared, "validation")[:4] == held_out[:4]
    assert manifest.validation_sources[0].documents == 5
    assert manifest.validation_fraction is None
    # The document that stands in both is validated on and not trained on.
    assert manifest.excluded_documents == 1
    assert manifest.train.documents == 29
    assert texts[3] not in documents(prepared, "train")
    assert texts[3].startswith(documents(prepared, "validation")[4])


def test_equal_documents_never_stand_in_both_splits(tmp_path: Path, texts: list[str]) -> None:
    folder = write_folder(tmp_path / "twice", [*texts, *texts])
    manifest = prepare(tmp_path / "out", [str(folder)])
    assert manifest.validation.documents % 2 == 0
    prepared = load_prepared(tmp_path / "out")
    assert not set(documents(prepared, "train")) & set(documents(prepared, "validation"))


def test_every_kind_of_source_gives_the_same_blocks(tmp_path: Path, corpus: str, texts: list[str]) -> None:
    pq.write_table(pa.table({"body": texts}), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    expected = tmp_path / "folder"
    prepare(expected, [corpus])
    for kind in ("parquet", "jsonl"):
        manifest = prepare(tmp_path / kind, [str(tmp_path / f"x.{kind}")], text_field="body")
        assert manifest.sources[0].kind == kind
        for split in ("train", "validation"):
            assert tokens(load_prepared(tmp_path / kind), split) == tokens(load_prepared(expected), split)


def test_given_tokenizer_is_used_and_saved(tmp_path: Path, corpus: str, tokenizer_folder: Path) -> None:
    manifest = prepare(tmp_path / "out", [corpus], tokenizer=str(tokenizer_folder))
    assert manifest.tokenizer.name == str(tokenizer_folder)
    assert manifest.tokenizer.trained_bytes is None
    theirs, ours = (
        json.loads((folder / "tokenizer.json").read_text())
        for folder in (tokenizer_folder, tmp_path / "out" / "tokenizer")
    )
    assert theirs == ours


def test_documents_that_hold_the_bytes_exactly_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    order, sizes = np.array([2, 0, 1]), np.array([4, 3, 2])
    for wanted, expected in ((1, [2]), (2, [2]), (3, [2, 0]), (6, [2, 0]), (7, [2, 0, 1]), (99, [2, 0, 1])):
        monkeypatch.setattr(survey, "TOKENIZER_TRAINING_BYTES", wanted)
        assert survey._first_bytes(order, sizes).tolist() == expected


def test_tokenizer_learns_from_a_sample_of_the_training_documents(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(tmp_path / "whole", [corpus])
    monkeypatch.setattr(survey, "TOKENIZER_TRAINING_BYTES", 5000)
    part = prepare(tmp_path / "part", [corpus])
    assert part.tokenizer.trained_bytes is not None
    assert part.tokenizer.trained_documents is not None
    assert 5000 <= part.tokenizer.trained_bytes < 5000 + 4000
    assert part.tokenizer.trained_documents < 24
    assert part.tokenizer.sha256 != whole.tokenizer.sha256
    assert part.train.documents == 24


def test_python_stdlib_can_be_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    this = next(file for file in resolve_source("python-stdlib").files if file.name == "this.py")
    for package in ("json", "test"):
        shutil.copytree(this.parent / "json", tmp_path / "lib" / package)
    shutil.copy(this, tmp_path / "lib")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
    manifest = prepare(tmp_path / "out", ["python-stdlib"], validation=[str(this)], vocab_size=300)
    assert manifest.train.documents == len([*(this.parent / "json").glob("*.py")])
    assert manifest.excluded_documents == 1
    assert manifest.sources[0].kind == "python-stdlib"


def test_same_options_reuse_the_folder(
    tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(tmp_path / "out", [corpus])
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr(stages, "open_documents", None)
    assert prepare(tmp_path / "out", [corpus], num_proc=2, overwrite=True, progress=True) == first
    assert "already prepared" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"block_size": 17}, {"vocab_size": 290}, {"validation_fraction": 0.3}, {"text_field": "body"}],
    ids=str,
)
def test_other_options_are_refused_or_overwrite(tmp_path: Path, corpus: str, change: dict[str, Any]) -> None:
    first = prepare(tmp_path / "out", [corpus])
    with pytest.raises(DataError, match=r"output .*out was prepared from other sources or with other options"):
        prepare(tmp_path / "out", [corpus], **change)
    assert load_prepared(tmp_path / "out").manifest == first
    second = prepare(tmp_path / "out", [corpus], overwrite=True, **change)
    assert load_prepared(tmp_path / "out").manifest == second != first
    assert leftovers(tmp_path) == ["corpus", "out"]


def test_changed_source_or_tokenizer_is_another_preparation(
    tmp_path: Path, corpus: str, tokenizer_folder: Path
) -> None:
    prepare(tmp_path / "out", [corpus])
    with pytest.raises(DataError, match="other options"):
        prepare(tmp_path / "out", [corpus], tokenizer=str(tokenizer_folder))
    os.utime(Path(corpus) / "000.txt", (1, 1))
    with pytest.raises(DataError, match="other sources"):
        prepare(tmp_path / "out", [corpus])


def test_damaged_folder_is_not_reused(tmp_path: Path, corpus: str) -> None:
    prepare(tmp_path / "out", [corpus])
    shutil.rmtree(tmp_path / "out" / "validation")
    with pytest.raises(DataError, match="or is incomplete"):
        prepare(tmp_path / "out", [corpus])
    prepare(tmp_path / "out", [corpus], overwrite=True)
    load_prepared(tmp_path / "out")


def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path, corpus: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"name": "a web app"}')
    for output in (tmp_path / "out", Path(corpus), Path(corpus) / "000.txt"):
        before = content(tmp_path)
        with pytest.raises(DataError, match="exists and is not a prepared folder: expected a new path"):
            prepare(output, [corpus], overwrite=True)
        assert content(tmp_path) == before


def test_a_file_of_mine_in_a_prepared_folder_is_not_overwritten(tmp_path: Path, corpus: str) -> None:
    prepare(tmp_path / "out", [corpus])
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(DataError, match=r"output .*out also holds notes\.md: expected a new path"):
        prepare(tmp_path / "out", [corpus], seed=1, overwrite=True)
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path, corpus: str) -> None:
    (tmp_path / "out").mkdir()
    prepare(tmp_path / "out", [corpus])
    assert load_prepared(tmp_path / "out").train
    assert leftovers(tmp_path) == ["corpus", "out"]


def test_failed_renaming_brings_the_old_folder_back(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(tmp_path / "out", [corpus])
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "result":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UnfinishedError, match=r"output .*out cannot be written: no; what is done stays in .*partial"):
        prepare(tmp_path / "out", [corpus], seed=1, overwrite=True)
    assert load_prepared(tmp_path / "out").manifest == first
    monkeypatch.undo()
    assert prepare(tmp_path / "out", [corpus], seed=1, overwrite=True).seed == 1
    assert leftovers(tmp_path) == ["corpus", "out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 256}, "vocab_size is 256: expected at least 257"),
        ({"vocab_size": 1 << 31}, "vocab_size is 2147483648: expected at least 257 .*, at most 1048576"),
        ({"block_size": 1 << 40}, "block_size is 1099511627776: expected at least 2, .*, at most 16777216"),
        ({"validation_fraction": math.nan}, "validation_fraction is nan: expected more than 0 and less than 1"),
        ({"num_proc": 10**9}, "num_proc is 1000000000: expected at least 1, at most 1024"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0"),
        ({"block_size": 1}, "block_size is 1: expected at least 2"),
        ({"validation_fraction": 0.0}, "validation_fraction is 0.0: expected more than 0 and less than 1"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0: expected more than 0 and less than 1"),
        ({"num_proc": 0}, "num_proc is 0: expected at least 1"),
        ({"sources": []}, "sources is empty: expected at least one name"),
        ({"sources": "python-stdlib"}, "sources is 'python-stdlib': expected a list of names"),
        ({"validation": "x"}, "validation is 'x': expected a list of names"),
        ({"validation": {"hub": "x"}}, "validation is {'hub': 'x'}: expected a list of names"),
        ({"limit_tokens": 0}, "limit_tokens is 0: expected at least 1"),
        ({"sources": ["python-stdlib", "python-stdlib"]}, "is in both, expected each once"),
        ({"validation": ["python-stdlib", "python-stdlib"]}, "is in both, expected each once"),
        ({"sources": ["hf:a/b"]}, "source 'hf:a/b' is streamed and would be read twice .* expected --tokenizer, or"),
        ({"validation": ["hf:a/b"]}, "source 'hf:a/b' is streamed and would be read twice"),
        ({"text_field": "x", "sources": ["{rows}"]}, "rows.jsonl, line 1 has no field 'x': it has 'text'"),
        ({"sources": ["no/such"]}, "source 'no/such' does not exist"),
        ({"validation": ["no/such"]}, "source 'no/such' does not exist"),
        ({"tokenizer": "no/such"}, "tokenizer 'no/such' cannot be loaded by AutoTokenizer"),
        ({"tokenizer": ""}, "tokenizer '' is not a folder"),
        ({"tokenizer": "a/b/c"}, "tokenizer 'a/b/c' is not a folder, and no name of a tokenizer on the hub"),
        ({"block_size": 100_000}, r"train has [\d]+ tokens in 24 documents, too few for one block of 100000"),
        ({"block_size": 10_000}, r"validation has \d+ tokens in 6 documents, too few for one block of 10000"),
    ],
    ids=str,
)
def test_bad_options_are_refused(tmp_path: Path, corpus: str, options: dict[str, Any], message: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}')
    if options.get("sources") == ["{rows}"]:
        options = {**options, "sources": [str(rows)]}
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path / "out", **{"sources": [corpus], **options})
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == ["corpus", "rows.jsonl"]


def test_a_hub_that_cannot_be_reached_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnfinishedError, match=r"source 'hf:a/b\?streaming=false' cannot be loaded: ") as caught:
        prepare(tmp_path / "out", ["hf:a/b?streaming=false"])
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


def test_too_few_documents_are_refused(tmp_path: Path, texts: list[str], tokenizer_folder: Path) -> None:
    one = str(write_folder(tmp_path / "one", [texts[0], texts[0]]))
    with pytest.raises(DataError, match="no documents are left to train on: the sources hold 1 different documents"):
        prepare(tmp_path / "out", [one])
    with pytest.raises(DataError, match="no documents are left to train on"):
        prepare(tmp_path / "out", [one], validation=[one])
    empty = str(write_folder(tmp_path / "empty", ["", ""]))
    for options in ({}, {"tokenizer": str(tokenizer_folder)}):
        with pytest.raises(DataError, match=r"source '.*empty' has no documents: 2 were skipped"):
            prepare(tmp_path / "out", [one, empty], **options)
        with pytest.raises(DataError, match=r"source '.*empty' has no documents: 2 were skipped"):
            prepare(tmp_path / "out", [one], validation=[empty], **options)
    assert leftovers(tmp_path) == ["empty", "one"]


def test_output_that_cannot_be_written_is_refused(tmp_path: Path, corpus: str) -> None:
    with pytest.raises(DataError, match=r"output .*000.txt/out cannot be written: Not a directory"):
        prepare(Path(corpus) / "000.txt" / "out", [corpus])


def test_missing_parents_are_made(tmp_path: Path, corpus: str) -> None:
    prepare(tmp_path / "a" / "b" / "out", [corpus])
    assert load_prepared(tmp_path / "a" / "b" / "out").train


def test_piped_bars_are_plain_lines_and_can_be_turned_off(
    tmp_path: Path, corpus: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not are_progress_bars_disabled()
    prepare(tmp_path / "quiet", [corpus])
    assert capfd.readouterr() == ("", "")
    prepare(tmp_path / "out", [corpus], progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert "\r" not in err
    for line in ("Reading documents", "30 documents", "Training the tokenizer", "Tokenising", "blocks of 16"):
        assert line in err
    assert not are_progress_bars_disabled()


def test_another_process_prepares_the_same_and_writes_nothing_to_the_home_folder(tmp_path: Path, corpus: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    code = (
        "from thoughtbubbles.data import load_prepared, prepare; "
        f"prepare({str(tmp_path / 'out')!r}, [{corpus!r}], **{SMALL!r}); "
        f"print(load_prepared({str(tmp_path / 'out')!r}).train[0])"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    assert not [file for file in home.rglob("*") if file.is_file()]
    prepare(tmp_path / "here", [corpus])
    assert content(tmp_path / "out") == content(tmp_path / "here")


@pytest.fixture
def out(tmp_path: Path, corpus: str) -> Path:
    prepare(tmp_path / "out", [corpus])
    return tmp_path / "out"


def test_missing_and_foreign_folders_do_not_load(tmp_path: Path, corpus: str) -> None:
    with pytest.raises(DataError, match="none does not exist: expected a folder written by `thoughtbubbles prepare`"):
        load_prepared(tmp_path / "none")
    with pytest.raises(DataError, match=r"corpus is not a prepared folder: it has no manifest.json"):
        load_prepared(corpus)


@pytest.mark.parametrize(
    "part", ["train/dataset_info.json", "validation/dataset_info.json", "tokenizer/tokenizer.json"]
)
def test_incomplete_folders_do_not_load(out: Path, part: str) -> None:
    (out / part).unlink()
    with pytest.raises(DataError, match=f"out is incomplete: {part} is missing, prepare the data again"):
        load_prepared(out)


def test_damaged_blocks_do_not_load(out: Path) -> None:
    manifest = Manifest.read(out)
    replace(manifest, block_size=8).write(out)
    with pytest.raises(DataError, match=r"train holds \d+ blocks of 16, the manifest says \d+ of 8"):
        load_prepared(out)
    manifest.write(out)
    (out / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"out is incomplete: train/data-00000-of-00001\.arrow is missing, prepare the"):
        load_prepared(out)


def test_another_tokenizer_does_not_load(out: Path) -> None:
    with (out / "tokenizer" / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(DataError, match="the tokenizer is not the one that made the blocks"):
        load_prepared(out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"manifest.json: not a manifest of prepared data"),
        ("[]", r"manifest.json: not a manifest of prepared data"),
        ("{}", r"manifest.json: not a manifest of prepared data"),
        ('{"format_version": 99}', r"manifest.json: format_version is 99, expected 3: prepare the data again"),
        ("[" * 100_000, r"manifest.json: not a manifest of prepared data"),
        ('{"format_version": 3}', r"manifest.json: a broken manifest of prepared data"),
    ],
)
def test_broken_manifests_do_not_load(out: Path, text: str, message: str) -> None:
    (out / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_prepared(out)


@pytest.mark.long
@pytest.mark.data
@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder `shared` beside the checkout")
def test_books_with_the_gpt2_tokenizer(tmp_path: Path) -> None:
    books = SHARED / "data" / "books" / "validation.parquet"
    manifest = prepare(
        tmp_path / "out",
        [str(books)],
        tokenizer=str(SHARED / "tokenizers" / "gpt2"),
        block_size=512,
        num_proc=2,
    )
    prepared = load_prepared(tmp_path / "out")
    assert manifest.tokenizer.eos_token_id == 50256
    assert manifest.vocab_size == 50257
    assert (manifest.train.documents, manifest.validation.documents) == (6, 2)
    texts = pq.read_table(books)["text"].to_pylist()
    backend = AutoTokenizer.from_pretrained(str(SHARED / "tokenizers" / "gpt2")).backend_tokenizer
    whole = [np.array(encoding.ids) for encoding in backend.encode_batch_fast(texts)]
    assert manifest.train.tokens + manifest.validation.tokens == sum(map(len, whole)) + 8
    # Cut into pieces for speed, every book has the tokens that it has when encoded whole.
    blocks = np.array(tokens(prepared, "validation"))
    first = next(ids for ids in whole if (blocks[1 : 1 + len(ids)] == ids).all() and blocks[1 + len(ids)] == 50256)
    assert len(first) > 10_000
