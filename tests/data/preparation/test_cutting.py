"""One document is cut inside, with a gap, and that is said."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.data.conftest import make_texts, write_folder
from thoughtbubbles.cli import app
from thoughtbubbles.data import DataError, Manifest, load_prepared, prepare
from thoughtbubbles.data.feed.heldout import HeldOut
from thoughtbubbles.data.preparation.cutting import cut_text
from thoughtbubbles.data.preparation.manifest import Cut

TEXT = "\r\n".join(make_texts(60, seed=3))
OPTIONS: dict[str, Any] = {"block_size": 32, "vocab_size": 300, "progress": False}


def decoded(folder: Path, split: str) -> str:
    """The text of a split's blocks, the separator in front left out."""
    data = load_prepared(folder)
    ids = getattr(data, split)[:]["input_ids"].flatten().tolist()
    assert ids[0] == data.manifest.tokenizer.separator_id
    assert data.manifest.tokenizer.separator_id not in ids[1:]
    return str(data.tokenizer().decode(ids[1:]))


def write_as(folder: Path, kind: str) -> str:
    folder.mkdir()
    row = json.dumps({"text": TEXT})
    contents = {
        "text.txt": TEXT.encode(),
        "text.txt.gz": gzip.compress(TEXT.encode()),
        "rows.jsonl": f'{{"text": null}}\n{row}\n'.encode(),
        "rows.json": row.encode(),
    }
    if kind == "folder":
        return str(write_folder(folder / "in", ["", TEXT]))
    (folder / kind).write_bytes(contents[kind])
    return str(folder / kind)


@pytest.mark.parametrize("kind", ["text.txt", "text.txt.gz", "rows.jsonl", "rows.json", "folder"])
def test_the_beginning_is_trained_on_and_the_end_held_out(tmp_path: Path, kind: str) -> None:
    manifest = prepare(tmp_path / "out", [write_as(tmp_path / "source", kind)], **OPTIONS)
    cut = manifest.cut
    assert cut is not None
    data = TEXT.encode()
    assert cut.train_bytes + cut.gap_bytes + cut.validation_bytes == len(data)
    assert len(data) * 0.045 < cut.validation_bytes < len(data) * 0.055
    assert 100 < cut.gap_bytes < 500
    train, validation = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "validation")
    assert data[: cut.train_bytes].decode().startswith(train[:-1])
    assert data[-cut.validation_bytes :].decode().startswith(validation[:-1])
    assert (manifest.train.documents, manifest.validation.documents, manifest.sources[0].documents) == (1, 1, 1)
    assert (manifest.train.bytes, manifest.validation.bytes) == (cut.train_bytes, cut.validation_bytes)
    assert manifest.tokenizer.trained_bytes == cut.train_bytes
    assert Manifest.read(tmp_path / "out") == manifest


def test_it_is_said(tmp_path: Path) -> None:
    command = ["prepare", str(tmp_path / "out"), write_as(tmp_path / "source", "text.txt"), "--block-size", "32"]
    done = CliRunner().invoke(app, [*command, "--vocab-size", "300", "--quiet"])
    assert done.exit_code == 0, done.output
    cut = Manifest.read(tmp_path / "out").cut
    assert cut is not None
    assert (
        f"one document: its first {cut.train_bytes:,} bytes are to train on, its last {cut.validation_bytes:,} for "
        f"validation, and the {cut.gap_bytes:,} between them in neither\n" in done.stdout
    )


@pytest.mark.parametrize("limit", [None, 10])
def test_a_given_tokenizer_and_a_limit_change_no_cut(tmp_path: Path, tokenizer_folder: Path, limit: int | None) -> None:
    options = {**OPTIONS, "tokenizer": str(tokenizer_folder), "limit_tokens": limit}
    manifest = prepare(tmp_path / "out", [write_as(tmp_path / "source", "text.txt")], **options)
    assert manifest.cut == prepare(tmp_path / "plain", [str(tmp_path / "source" / "text.txt")], **OPTIONS).cut


def test_other_sources_are_not_cut(tmp_path: Path) -> None:
    one = write_as(tmp_path / "source", "text.txt")
    (tmp_path / "other.txt").write_text("another text that is long enough " * 20)
    assert prepare(tmp_path / "a", [one], validation=[str(tmp_path / "other.txt")], **OPTIONS).cut is None
    assert prepare(tmp_path / "b", [one, str(tmp_path / "other.txt")], **OPTIONS).cut is None
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(DataError, match="no documents are left to train on"):
        prepare(tmp_path / "c", [str(tmp_path / "short.txt")], **OPTIONS)


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("\n", ""), "".join(TEXT.split()), "石" * 5000], ids=range(4))
def test_cuts_are_where_lines_or_words_end(text: str) -> None:
    train, gap, validation = cut_text(text, 0.1, 32)
    assert train + gap + validation == text
    assert 0 < len(gap) <= 4 * 32 + 200
    assert abs(len(validation) / len(text) - 0.1) < 0.02
    if "\n" in text:
        assert train.endswith("\n")
        assert gap.endswith("\n")
    elif " " in text:
        assert gap[0].isspace()
        assert validation[0].isspace()


def test_a_short_text_holds_out_enough_for_a_block() -> None:
    train, _, validation = cut_text("word " * 1000, 0.01, 128)
    assert len(validation) >= 8 * 128
    assert len(train) > 2 * len(validation)


def test_a_stream_cannot_leave_a_part_of_a_document_out(tmp_path: Path) -> None:
    prepare(tmp_path / "out", [write_as(tmp_path / "source", "text.txt")], **OPTIONS)
    with pytest.raises(DataError, match="out: its validation is a part of a document, which a stream cannot"):
        HeldOut([load_prepared(tmp_path / "out")], 0)


def test_a_cut_is_said_in_one_line() -> None:
    assert str(Cut(1000, 20, 300)).count("\n") == 0
