"""`limit_tokens`, and what the manifest says of each source."""

from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import make_texts, write_folder
from tests.data.preparation.test_prepare import documents, prepare
from thoughtbubbles.data import load_prepared
from thoughtbubbles.data.preparation.manifest import SourceRecord
from thoughtbubbles.data.tokenizer import load_data_tokenizer


@pytest.fixture
def lengths(texts: list[str], tokenizer_folder: Path) -> list[int]:
    """Tokens of each text, the separator included."""
    encoded = load_data_tokenizer(tokenizer_folder)(texts, add_special_tokens=False)["input_ids"]
    return [len(ids) + 1 for ids in encoded]


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("num_proc", [1, 3])
def test_the_document_that_reaches_the_limit_is_the_last(
    tmp_path: Path, corpus: str, tokenizer_folder: Path, lengths: list[int], extra: int, num_proc: int
) -> None:
    limit = sum(lengths[:10]) + extra
    kept = 10 + extra
    options: dict[str, Any] = {"tokenizer": str(tokenizer_folder), "limit_tokens": limit, "num_proc": num_proc}
    other = str(write_folder(tmp_path / "other", make_texts(4, seed=3)))
    manifest = prepare(tmp_path / "out", [corpus, other], validation=[str(Path(corpus) / "029.txt")], **options)
    first, second = manifest.sources
    assert (first.documents, first.tokens, first.limit_tokens, first.reached_limit) == (
        kept,
        sum(lengths[:kept]),
        limit,
        True,
    )
    assert (second.documents, second.limit_tokens, second.reached_limit) == (4, limit, second.tokens >= limit)
    # Validation is read whole.
    (validation,) = manifest.validation_sources
    assert (validation.documents, validation.limit_tokens, validation.reached_limit) == (1, None, False)
    assert manifest.train.tokens == first.tokens + second.tokens


def test_a_limit_beyond_the_text_changes_nothing(
    tmp_path: Path, corpus: str, tokenizer_folder: Path, lengths: list[int]
) -> None:
    for name, limit in (("all", None), ("more", sum(lengths) + 1)):
        manifest = prepare(tmp_path / name, [corpus], tokenizer=str(tokenizer_folder), limit_tokens=limit)
        assert manifest.sources[0].tokens == sum(lengths)
        assert not manifest.sources[0].reached_limit
    ours, theirs = (documents(load_prepared(tmp_path / name), "train") for name in ("all", "more"))
    assert ours == theirs


def test_a_trained_tokenizer_sees_the_text_beyond_the_limit(tmp_path: Path, corpus: str) -> None:
    whole = prepare(tmp_path / "whole", [corpus])
    part = prepare(tmp_path / "part", [corpus], limit_tokens=2000)
    assert part.tokenizer == whole.tokenizer
    assert part.sources[0].reached_limit
    assert part.sources[0].documents < 30
    # What is held out is not what the tokenizer was trained on.
    held_out = set(documents(load_prepared(tmp_path / "part"), "validation")[:-1])
    assert held_out <= set(documents(load_prepared(tmp_path / "whole"), "validation"))


def test_a_file_source_is_recorded(tmp_path: Path, corpus: str, lengths: list[int], tokenizer_folder: Path) -> None:
    manifest = prepare(tmp_path / "out", [corpus], tokenizer=str(tokenizer_folder))
    assert manifest.sources == (
        SourceRecord(
            name=corpus,
            kind="text",
            files=30,
            field=None,
            config=None,
            split=None,
            revision=None,
            commit=None,
            streaming=None,
            documents=30,
            bytes=manifest.train.bytes + manifest.validation.bytes,
            tokens=sum(lengths),
            skipped=0,
            limit_tokens=None,
            reached_limit=False,
        ),
    )
