import hashlib
import json
import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.data.conftest import make_texts
from thoughtbubbles.data import DataError
from thoughtbubbles.data import tokenizer as module
from thoughtbubbles.data.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    Encoder,
    allows_cuts,
    cut_at_spaces,
    load_data_tokenizer,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], threads: int = 1) -> list[list[int]]:
    ids: dict[int, list[int]] = defaultdict(list)
    for piece in Encoder(tokenizer, threads).encode(enumerate(texts)):
        ids[piece.document] += piece.tokens.tolist()
    return [ids[number] for number in range(len(texts))]


def spec(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return dict(json.loads(tokenizer.backend_tokenizer.to_str()))


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(make_texts(30), 330)


def test_trained_vocabulary_has_every_byte_and_the_size_asked_for(trained: PreTrainedTokenizerFast) -> None:
    assert vocabulary_size(trained) == len(trained) == 330
    assert trained.eos_token == trained.bos_token == END_OF_TEXT
    assert trained.eos_token_id == trained.bos_token_id == 0
    unseen = "ÿ\x00\x1f \U0001f9e0 ẞ\u2028"
    assert trained.decode(encode(trained, [unseen])[0]) == unseen


def test_small_corpus_gives_a_smaller_vocabulary() -> None:
    assert vocabulary_size(train_tokenizer(["ab"], 4096)) == 257


def test_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="vocab_size is 256: expected at least 257"):
        train_tokenizer(["text"], 256)


def test_saved_tokenizer_is_loadable_and_never_warns_of_length(
    tokenizer_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.eos_token == loaded.bos_token == END_OF_TEXT
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    ids = loaded("bubble " * 20_000)["input_ids"]
    assert len(ids) >= 20_000
    assert not caplog.records
    content = (tokenizer_folder / "tokenizer.json").read_bytes()
    assert tokenizer_hash(tokenizer_folder) == hashlib.sha256(content).hexdigest()


def test_the_text_of_a_special_token_is_ordinary_text(trained: PreTrainedTokenizerFast) -> None:
    text = f"one {END_OF_TEXT} two"
    ids = encode(trained, [text])[0]
    assert trained.eos_token_id not in ids
    assert trained.decode(ids) == text


@pytest.mark.parametrize("threads", [1, 3])
def test_cut_documents_have_the_tokens_of_whole_ones(
    trained: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    texts = make_texts(20, seed=1)
    expected = [trained.backend_tokenizer.encode(text).ids for text in texts]
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 7)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 100)
    assert allows_cuts(spec(trained))
    assert len(list(cut_at_spaces(texts[0]))) > 20
    assert encode(trained, texts, threads) == expected


BYTES_ALONE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITTERS = {
    "ours": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated"), BYTES_ALONE]),
}
SPACES = "\t\n\x0b\x0c\r\x1c\x1d\x1f \x85\xa0\u180e\u2003\u200b\u2028\u3000"


@pytest.mark.parametrize("splitter", SPLITTERS)
@given(text=st.text(st.sampled_from("ab1.,'s!_é思  " + SPACES)))
@settings(max_examples=300, deadline=None)
def test_cuts_stand_where_pre_tokenizers_split(splitter: str, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_CHARACTERS", 0)
        pieces = list(cut_at_spaces(text))
    assert "".join(pieces) == text
    split = SPLITTERS[splitter].pre_tokenize_str
    assert [part for piece in pieces for part, _ in split(piece)] == [part for part, _ in split(text)]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "use_regex": True, "add_prefix_space": True}},
        {"added_tokens": [{"content": "\n\n", "lstrip": False, "rstrip": False}]},
        {"added_tokens": [{"content": "<mask>", "lstrip": True, "rstrip": False}]},
    ],
    ids=str,
)
def test_other_tokenizers_are_not_cut(trained: PreTrainedTokenizerFast, change: dict[str, Any]) -> None:
    assert not allows_cuts(spec(trained) | change)


def test_a_tokenizer_that_joins_words_encodes_documents_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, " ": 1, "a ": 2, "</s>": 3}, merges=[("a", " ")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 1)
    assert encode(tokenizer, ["a a a"]) == [[2, 2, 0]]


def test_truncation_and_padding_of_a_tokenizer_are_not_applied(trained: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=9, pad_token=END_OF_TEXT)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    texts = ["a", "bubble " * 50]
    assert encode(tokenizer, texts) == encode(trained, texts)


def test_the_environment_is_left_as_it_was(trained: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    encode(trained, ["text"])
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    encode(trained, ["text"])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_bad_tokenizer_folders_are_refused(tmp_path: Path, trained: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"tokenizer '.*none' is not a folder, and no name of a tokenizer on the hub"):
        load_data_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"tokenizer '.*empty' cannot be loaded by AutoTokenizer: .+"):
        load_data_tokenizer(tmp_path / "empty")
    PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer).save_pretrained(str(tmp_path / "no-eos"))
    with pytest.raises(DataError, match=r"tokenizer '.*no-eos' has no eos token: expected one"):
        load_data_tokenizer(tmp_path / "no-eos")


def test_a_tokenizer_is_had_by_its_name_on_the_hub(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    load = AutoTokenizer.from_pretrained

    def from_hub(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return load(str(tokenizer_folder), **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_hub)
    assert vocabulary_size(load_data_tokenizer("some-one/tiny.v2")) == 300
    (tmp_path / "some-one" / "tiny.v2").mkdir(parents=True)
    load_data_tokenizer("some-one/tiny.v2")
    # A folder goes before a name, and is read without the network.
    assert [options["local_files_only"] for _, options in asked] == [False, True]
    assert {name for name, _ in asked} == {"some-one/tiny.v2"}


def test_a_tokenizer_that_cannot_be_had_is_one_line() -> None:
    message = (
        r"tokenizer 'no-one/nothing' cannot be loaded by AutoTokenizer \(no such folder; taken for a name on the hub"
    )
    with pytest.raises(DataError, match=message) as caught:
        load_data_tokenizer("no-one/nothing")
    assert "\n" not in str(caught.value)
