"""Text as tokens come: nothing that was said changes, and joined it is the text of all tokens."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests import tokenizer_kinds
from thoughtbubbles.data.tokenizer import load_data_tokenizer
from thoughtbubbles.support.detokenizer import Detokenizer, TokenTable
from thoughtbubbles.support.text import decode_after, encode_text

KINDS: dict[str, Callable[[Path], Path]] = {
    "byte-level": tokenizer_kinds.byte_level,
    "sentencepiece": tokenizer_kinds.sentencepiece,
    "byte-fallback": tokenizer_kinds.byte_fallback,
    "byte-fallback-plain": partial(tokenizer_kinds.byte_fallback, strips=False),
    "word-pieces": tokenizer_kinds.word_pieces,
    "word-ends": tokenizer_kinds.word_ends,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return made(request.param, tmp_path_factory.mktemp("tokenizer"))


def made(kind: str, folder: Path) -> PreTrainedTokenizerFast:
    return load_data_tokenizer(KINDS[kind](folder))


def said(table: TokenTable, before: list[int], ids: list[int]) -> list[str]:
    """What is said at each token, and at the end."""
    detokenizer = Detokenizer(table, before)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


def tokens_of(tokenizer: PreTrainedTokenizerFast) -> st.SearchStrategy[list[int]]:
    """Tokens of any kind; those of one byte, which stand at the end or the beginning, more often than others."""
    size = len(tokenizer)
    euro = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "€".encode()]
    bytewise = encode_text(tokenizer, "€") if tokenizer.unk_token_id is None else euro
    known = [token for token in bytewise if token is not None and token != tokenizer.unk_token_id]
    anywhere = st.integers(0, size - 1)
    return st.lists(st.one_of(anywhere, st.sampled_from(known or [0]), st.integers(max(size - 256, 0), size - 1)))


@given(data=st.data())
def test_what_is_said_is_the_text_of_all_tokens(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    table = TokenTable(tokenizer)
    before, ids = (data.draw(tokens_of(tokenizer)) for _ in range(2))
    assert "".join(said(table, before, ids)) == decode_after(tokenizer, before + ids, len(before))


@given(data=st.data())
def test_text_of_a_tokenizer_comes_back(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    words = data.draw(st.lists(st.sampled_from(tokenizer_kinds.WORDS), min_size=2))
    ids = encode_text(tokenizer, " ".join(words))
    border = data.draw(st.integers(0, len(ids)))
    table = TokenTable(tokenizer)
    before = "".join(said(table, [], ids[:border]))
    assert before + "".join(said(table, ids[:border], ids[border:])) == " ".join(words)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_a_character_waits_for_its_last_byte(kind: str, tmp_path: Path) -> None:
    tokenizer = made(kind, tmp_path)
    table, ids = TokenTable(tokenizer), encode_text(tokenizer, "€")[-3:]
    end = encode_text(tokenizer, "river")[-1:]
    texts = said(table, encode_text(tokenizer, "the"), ids + end)
    assert "".join(texts).startswith("€")
    assert texts[:2] == ["", ""]
    rest = said(table, [*encode_text(tokenizer, "the"), *ids[:2]], ids[2:] + end)
    assert "".join(rest) == "".join(texts)


def test_one_bad_byte_spoils_a_run_of_byte_tokens(tmp_path: Path) -> None:
    tokenizer = made("byte-fallback", tmp_path)
    table = TokenTable(tokenizer)
    good, bad = encode_text(tokenizer, "é")[-2:], encode_text(tokenizer, "é")[-2:-1]
    assert said(table, [], [*good, *bad]) == ["", "", "", "\ufffd" * 3]
    assert said(table, [], good) == ["", "", "é"]


def test_special_tokens_have_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    table, end = TokenTable(tokenizer), int(tokenizer.eos_token_id)
    ids = encode_text(tokenizer, "river stone")
    assert "".join(said(table, [end], [*ids[:1], end, *ids[1:]])) == "river stone"
    assert (table.raw(end).decode(), table.name(end)) == (tokenizer.eos_token, tokenizer.eos_token)


def test_tokens_have_names_and_bytes(tmp_path: Path) -> None:
    for kind, letter in (("byte-level", "Ġ"), ("byte-fallback", "▁")):
        tokenizer = made(kind, tmp_path / kind)
        table = TokenTable(tokenizer)
        first, *_ = encode_text(tokenizer, "€")[-3:]
        assert (table.raw(first), table.name(first)) == (b"\xe2", "bytes:\\xe2")
        space = tokenizer.convert_tokens_to_ids(letter)
        assert (table.raw(space), table.name(space)) == (b" ", " ")
        assert (table.raw(10**6), table.name(10**6)) == (b"", "")


def test_a_long_answer_of_bytes_takes_no_longer_a_token(tmp_path: Path) -> None:
    """A model that spells nonsense keeps no growing tail: what is certainly no character is said at once."""
    tokenizer = made("byte-level", tmp_path)
    bad = next(token for token in range(len(tokenizer)) if TokenTable(tokenizer).raw(token) == b"\xff")
    assert said(TokenTable(tokenizer), [], [bad] * 3) == ["\ufffd"] * 3 + [""]
