import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from thoughtbubbles.data import DataError
from thoughtbubbles.data import tokenizer as tokenizer_module
from thoughtbubbles.data.feed import sft
from thoughtbubbles.data.feed.sft import Examples, Template, read_examples
from thoughtbubbles.data.tokenizer import END_OF_TEXT, load_data_tokenizer

PROMPT = Template("data.prompt", "Q: {question}\nA:")
COMPLETION = Template("data.completion", " {answer}")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return load_data_tokenizer(tokenizer_folder)


def make_rows(count: int) -> list[dict[str, Any]]:
    return [{"question": f"what keeps token {i}?", "answer": "the root " * (1 + i % 3) + str(i)} for i in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(source: str, tokenizer: PreTrainedTokenizerFast, max_length: int = 512) -> Examples:
    return read_examples(source, PROMPT, COMPLETION, tokenizer, max_length)


def one(
    folder: Path, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], completion: Template = COMPLETION
) -> Examples:
    return read_examples(write(folder / "one.jsonl", [row]), PROMPT, completion, tokenizer, 512)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Question: {question}\nAnswer:", "Question: a {b} c\nAnswer:"),
        ("{question}{n}", "a {b} c3"),
        ("{x} {price} {two words}", "0.5 1.20 w"),
        ("{{{n}}} {{n}} }}{{", "{3} {n} }{"),
        ("nothing", "nothing"),
        ("", ""),
        ("{empty}", ""),
    ],
)
def test_templates_are_filled(template: str, expected: str) -> None:
    row = {"question": "a {b} c", "n": 3, "x": 0.5, "price": Decimal("1.20"), "two words": "w", "empty": "", "b": "no"}
    assert Template("data.prompt", template).fill(row, "here") == expected


def test_templates_know_their_fields() -> None:
    assert Template("data.prompt", "{{x}} {a}{b c}").fields == ("a", "b c")


@pytest.mark.parametrize(("template", "character"), [("a {", 3), ("{}", 1), ("{a}} b", 4), ("{a {b}", 1)])
def test_a_brace_of_no_field_is_an_error(template: str, character: int) -> None:
    with pytest.raises(DataError) as caught:
        Template("data.prompt", template)
    assert str(caught.value) == (
        f"data.prompt={template!r}: character {character} is a brace of no field: expected {{FIELD}}, "
        "or {{ and }} for braces themselves"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "row 1 has no field 'answer': it has 'question'"),
        ({"question": "q", "answer": None}, "row 1: field 'answer' is null, expected text or a number"),
        ({"question": "q", "answer": float("nan")}, "row 1: field 'answer' is nan, expected text or a number"),
        ({"question": "q", "answer": ["a"]}, "row 1: field 'answer' holds a list, expected text or a number"),
        ({"question": True, "answer": "a"}, "row 1: field 'question' holds a bool, expected text or a number"),
        ({"question": "q", "answer": ""}, "row 1: the completion ' ' is empty, expected text to learn"),
        ({"question": "q\ud800", "answer": "a"}, r"row 1: '\\ud800' is no character, expected Unicode text"),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"one.jsonl, {message}"):
        one(tmp_path, tokenizer, row)


def test_bad_sources_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "hub").mkdir()
    for source, message in (
        ("text.txt", "text.txt is text: expected rows"),
        ("empty.jsonl", r"source '.*empty\.jsonl' has no rows"),
        ("none.jsonl", "does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            read(str(tmp_path / source), tokenizer)
    with pytest.raises(DataError, match="field='x' has no use here: the recipe names the fields"):
        read(f"hf:{tmp_path}/hub?field=x", tokenizer)


def test_a_completion_without_a_field_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        DataError, match=r"data\.completion='yes': expected a field of the rows, such as \{completion\}"
    ):
        one(tmp_path, tokenizer, make_rows(1)[0], Template("data.completion", "yes"))


def test_an_example_is_separator_prompt_completion_and_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = one(tmp_path, tokenizer, {"question": f"is {END_OF_TEXT} text?", "answer": 12})
    plain = tokenizer.backend_tokenizer
    plain.encode_special_tokens = True
    prompt = plain.encode(f"Q: is {END_OF_TEXT} text?\nA:", add_special_tokens=False).ids
    completion = plain.encode(" 12", add_special_tokens=False).ids
    plain.encode_special_tokens = False
    assert 0 not in prompt
    assert examples[0].tokens.tolist() == [0, *prompt, *completion, 0]
    assert examples[0].targets.tolist() == [False] * (1 + len(prompt)) + [True] * (len(completion) + 1)
    assert (examples.length(0), examples.longest) == (len(examples[0].tokens),) * 2


def test_a_bos_token_is_the_separator(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    backend, start = tokenizer.backend_tokenizer, tokenizer.convert_ids_to_tokens(5)
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, bos_token=start)
    tokens = one(tmp_path, other, make_rows(1)[0])[0].tokens
    assert (tokens[0], tokens[-1]) == (5, 0)


def test_tokens_are_held_flat_and_small(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = read(write(tmp_path / "rows.jsonl", make_rows(50)), tokenizer)
    assert examples.tokens.dtype == np.uint16
    assert len(examples.tokens) == sum(examples.length(i) for i in range(50))
    assert examples.describe(49).endswith("rows.jsonl, row 50")


def test_threads_and_pieces_change_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "rows.jsonl", make_rows(50))
    expected = read(source, tokenizer).fingerprint()
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 7)
    monkeypatch.setattr(tokenizer_module, "BATCH_PIECES", 3)
    assert read(source, tokenizer).fingerprint() == expected


def test_fingerprints_tell_borders_and_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    sources = [write(tmp_path / "1.jsonl", rows), write(tmp_path / "2.jsonl", rows[::-1])]
    found = {read(source, tokenizer).fingerprint() for source in sources}
    moved = Template("data.prompt", "Q: {question}\n"), Template("data.completion", "A: {answer}")
    found.add(read_examples(sources[0], *moved, tokenizer, 512).fingerprint())
    assert len(found) == 3


def test_all_kinds_of_sources_give_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = make_rows(20)
    expected = read(write(tmp_path / "rows.jsonl", rows), tokenizer).fingerprint()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=6)
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub" / "train.parquet")
    for source in (str(tmp_path / "rows.parquet"), f"hf:{tmp_path}/hub", f"hf:{tmp_path}/hub?streaming=false"):
        assert read(source, tokenizer).fingerprint() == expected
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "1.jsonl", rows[:7])
    write(tmp_path / "parts" / "2.jsonl", rows[7:])
    parts = read(str(tmp_path / "parts"), tokenizer)
    assert parts.fingerprint() == expected
    assert parts.describe(7).endswith("parts, row 8")


def test_long_rows_are_left_out_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "rows.jsonl", make_rows(30))
    everything = read(source, tokenizer)
    lengths = [everything.length(i) for i in range(30)]
    limit = sorted(lengths)[12]
    some = read(source, tokenizer, limit)
    kept = [i for i in range(30) if lengths[i] <= limit]
    assert (len(some), some.too_long, some.longest) == (len(kept), 30 - len(kept), limit)
    for place, row in enumerate(kept):
        assert some[place].tokens.tolist() == everything[row].tokens.tolist()
        assert some.describe(place) == everything.describe(row)
        assert some.table["digest"][place] == everything.table["digest"][row]
    with pytest.raises(DataError) as caught:
        read(source, tokenizer, 5)
    assert str(caught.value) == (
        f"source {source!r}: all 30 rows are longer than max_length=5, expected at least {min(lengths)}, the tokens of "
        "the shortest"
    )


def test_held_out_rows_share_no_text_with_the_others(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "rows.jsonl", make_rows(40) * 3)
    train, validation = read(source, tokenizer).split(0.25, seed=0)
    assert (len(train), len(validation)) == (90, 30)
    texts = [{tuple(example.tokens.tolist()) for example in side} for side in (train, validation)]
    assert not texts[0] & texts[1]
    again = read(source, tokenizer).split(0.25, seed=0)
    assert [each.fingerprint() for each in again] == [train.fingerprint(), validation.fingerprint()]
    assert read(source, tokenizer).split(0.25, seed=1)[1].fingerprint() != validation.fingerprint()


def test_rows_of_the_validation_source_are_not_trained_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = make_rows(20)
    train = read(write(tmp_path / "train.jsonl", rows), tokenizer)
    validation = read(write(tmp_path / "validation.jsonl", rows[3:5] + make_rows(30)[25:]), tokenizer)
    left = train.without(validation)
    assert left.table["row"].tolist() == [*range(1, 4), *range(6, 21)]
    # The same text with the border elsewhere is another example.
    moved = Template("data.prompt", "Q: {question}\nA"), Template("data.completion", ": {answer}")
    assert len(train.without(read_examples(str(tmp_path / "validation.jsonl"), *moved, tokenizer, 512))) == 20


def test_nothing_left_to_train_on_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = read(write(tmp_path / "rows.jsonl", make_rows(1) * 5), tokenizer)
    with pytest.raises(DataError, match=r"no rows are left to train on: the 5 of .*rows\.jsonl are held out"):
        examples.split(0.2, seed=0)
    with pytest.raises(DataError, match=r"no rows are left to train on: .* are all in .*rows\.jsonl too"):
        examples.without(examples)


def test_progress_is_shown(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "rows.jsonl", make_rows(3))
    sft.read_examples(source, PROMPT, COMPLETION, tokenizer, 512, progress=True)
    assert "3 rows" in capsys.readouterr().err
