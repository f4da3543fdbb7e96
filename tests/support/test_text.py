"""What precedes a text, asked by all alike; text in and out of tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import PreTrainedTokenizerFast

from tests.helpers import random_model, tiny_config
from tests.tokenizer_kinds import CORPUS, END, byte_fallback, byte_level, sentencepiece
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.app.exhibit import Exhibit
from thoughtbubbles.data import load_prepared, prepare
from thoughtbubbles.data.feed.sft import Template, read_examples
from thoughtbubbles.data.tokenizer import Encoder, load_data_tokenizer
from thoughtbubbles.evaluation.answering import Question, answer_questions, make_batches
from thoughtbubbles.evaluation.generation import Sampling, TextPrinter, generate_text
from thoughtbubbles.evaluation.harness import adapter
from thoughtbubbles.evaluation.perplexity import TextSize, read_blocks
from thoughtbubbles.inspection.trace import to_ids, trace_bubbles
from thoughtbubbles.model.loading import check_start, load_model, load_tokenizer
from thoughtbubbles.support.detokenizer import TokenTable
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.text import (
    decode_after,
    document_ends,
    encode_text,
    record_start,
    start_document,
    token_pieces,
)


def model_of(tokenizer: PreTrainedTokenizerFast, **fields: Any) -> ThoughtbubblesForCausalLM:
    return random_model(tiny_config(**{"vocab_size": len(tokenizer), "max_position_embeddings": 64, **fields}))


def starts(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, list[int]]:
    """What everything puts before the text `the river`, or that text as a prompt."""
    folder.mkdir()
    count = len(encode_text(tokenizer, "the river"))
    (folder / "text.txt").write_text("the river")
    (folder / "rows.jsonl").write_text(json.dumps({"p": "the river", "c": " of stone"}) + "\n")
    model = model_of(tokenizer)
    generated = generate_text(model, tokenizer, "the river", 2)
    (example,) = read_examples(str(folder / "rows.jsonl"), Template("p", "{p}"), Template("c", "{c}"), tokenizer, 512)
    (batch,) = make_batches(tokenizer, [Question(1, "the river", " of stone", 1)], "rows", 64)
    lm = adapter()(model, tokenizer=tokenizer, batch_size=1)
    return {
        "generate": generated.ids[: generated.prompt_tokens - count],
        "inspect": to_ids(tokenizer, "the river")[:-count],
        "page": Exhibit("m", model, tokenizer).prompt("the river", 4)[0][:-count],
        "perplexity": read_blocks(folder / "text.txt", tokenizer, 64)[0, :-count].tolist(),
        "exact match": batch.prompts[0][:-count],
        "sft": example.tokens[: example.targets.argmax() - count].tolist(),
        "harness, scores": lm._encode_pair("the river", " of stone")[0][:-count],
        "harness, no context": [lm.prefix_token_id],
        "harness, prompts": lm.tok_batch_encode(["the river"])[0][0, :-count].tolist(),
    }


@pytest.mark.parametrize(
    ("bos", "eos", "template", "expected"),
    [
        (END, END, None, END),
        ("<s>", "</s>", None, "<s>"),
        (None, "</s>", None, "</s>"),
        ("<s>", "</s>", "<s> $A", "<s>"),
        ("<s>", "</s>", "<s> $A </s>", "<s>"),
        (END, END, f"$A {END}", END),
        ("<s>", "</s>", "</s> $A", "</s>"),
    ],
)
def test_without_a_record_the_tokenizers_own_rule_precedes_a_text(
    tmp_path: Path, bos: str | None, eos: str, template: str | None, expected: str
) -> None:
    tokenizer = load_data_tokenizer(byte_level(tmp_path / "tok", bos, eos, template))
    wanted = [tokenizer.convert_tokens_to_ids(expected)]
    assert starts(tokenizer, tmp_path / "work") == dict.fromkeys(starts(tokenizer, tmp_path / "again"), wanted)


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>", "$A </s>"])
def test_what_preceded_documents_in_training_precedes_every_text(tmp_path: Path, template: str | None) -> None:
    """A plain tokenizer's bos is never trained on: eos stands between documents."""
    byte_level(tmp_path / "tok", "<s>", "</s>", template)
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    prepare(tmp_path / "data", [str(tmp_path / "docs.jsonl")], tokenizer=str(tmp_path / "tok"), block_size=16,
            progress=False)  # fmt: skip
    data = load_prepared(tmp_path / "data")
    ids = data.train[:]["input_ids"].flatten().tolist()
    tokenizer = data.tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (ids.count(bos), ids[0]) == (0, eos)
    assert ids.count(eos) >= data.manifest.train.documents - 1
    assert (data.manifest.tokenizer.separator, data.manifest.tokenizer.separator_id) == ("</s>", eos)
    found = starts(tokenizer, tmp_path / "work")
    assert found == {name: [eos] for name in found}


def test_a_record_goes_with_the_tokenizer_into_new_data(tmp_path: Path) -> None:
    tokenizer = load_data_tokenizer(byte_level(tmp_path / "tok", "<s>", "</s>"))
    record_start(tokenizer, tokenizer.bos_token_id)
    tokenizer.save_pretrained(tmp_path / "recorded")
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    options: dict[str, Any] = {"tokenizer": str(tmp_path / "recorded"), "block_size": 16, "progress": False}
    prepare(tmp_path / "data", [str(tmp_path / "docs.jsonl")], **options)
    data = load_prepared(tmp_path / "data")
    assert data.train[0]["input_ids"][0] == data.tokenizer().bos_token_id
    assert start_document(data.tokenizer()) == [data.tokenizer().bos_token_id]
    # Where the next document begins, this one has ended.
    assert document_ends(data.tokenizer()) == [data.tokenizer().eos_token_id, data.tokenizer().bos_token_id]


def test_a_record_of_no_token_is_refused(tmp_path: Path) -> None:
    tokenizer = load_data_tokenizer(byte_level(tmp_path / "tok", document_start="<nothing>"))
    with pytest.raises(InputError, match=r"document_start='<nothing>': expected a token of the vocabulary"):
        start_document(tokenizer)


def test_a_model_is_measured_on_data_with_its_own_separator(tmp_path: Path) -> None:
    tokenizer = load_data_tokenizer(byte_level(tmp_path / "m", "<s>", "</s>"))
    model_of(tokenizer).save_pretrained(tmp_path / "m")
    check_start(tmp_path / "m", tokenizer, "data")  # nothing is recorded, nothing is known
    record_start(tokenizer, tokenizer.eos_token_id)
    tokenizer.save_pretrained(tmp_path / "m")
    check_start(tmp_path / "m", tokenizer, "data")
    record_start(tokenizer, tokenizer.bos_token_id)
    with pytest.raises(InputError, match=r"data data: '<s>' stands before its documents, expected '</s>' as in what"):
        check_start(tmp_path / "m", tokenizer, "data")


def test_a_tokenizers_own_special_tokens_change_no_score(tmp_path: Path) -> None:
    plain = load_data_tokenizer(byte_level(tmp_path / "plain"))
    adding = load_data_tokenizer(byte_level(tmp_path / "adding", template=f"$A {END}"))
    model, context, text = model_of(plain), "the river of", " stone house"
    found = []
    for tokenizer in (plain, adding):
        lm = adapter()(model, tokenizer=tokenizer, batch_size=2)
        settings = {"until": ["\n"], "max_gen_toks": 5}
        found.append(
            (
                lm.loglikelihood([Instance("loglikelihood", {}, (context, text), 0)], disable_tqdm=True),
                lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (context,), 0)], disable_tqdm=True),
                lm.generate_until([Instance("generate_until", {}, (context, settings), 0)], disable_tqdm=True),
            )
        )
    assert found[0] == found[1]
    ids, border = [0, *encode_text(plain, context + text)], 1 + len(encode_text(plain, context))
    losses = torch.nn.functional.cross_entropy(
        model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none"
    )
    assert found[0][0][0][0] == pytest.approx(-losses[border - 1 :].sum().item(), abs=1e-3)


CONTENTS = {
    "windows line ends": b"the river\r\nof stone\r\nhouse\r\n",
    "old line ends": b"the river\rof stone\rhouse\r",
    "a mark in front": b"\xef\xbb\xbfthe river\r\n",
    "words of a special token": f"the river of {END} stone{END}\n".encode(),
    "spaces": b"  the river \n\n\t",
    "all characters": "thé ríver 石 \u2028 \x85 \x0c \x00 \U0001f300".encode(),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_all_read_the_same_tokens_from_a_file(tmp_path: Path, content: bytes) -> None:
    tokenizer = load_data_tokenizer(byte_level(tmp_path / "tok"))
    text = content.decode("utf-8-sig")
    expected = [0, *Encoder(tokenizer, 1).encode_one(text).tolist()]
    assert 0 not in expected[1:]
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert read_blocks(path, tokenizer, 10**6)[0].tolist() == expected
    assert to_ids(tokenizer, text) == expected
    (tmp_path / "other.txt").write_text("another text " * 100)
    options: dict[str, Any] = {"validation": [str(tmp_path / "other.txt")], "block_size": len(expected)}
    prepare(tmp_path / "data", [str(path)], tokenizer=str(tmp_path / "tok"), progress=False, **options)
    assert load_prepared(tmp_path / "data").train[0]["input_ids"].tolist() == expected


def test_documents_of_rows_stay_apart(tmp_path: Path) -> None:
    tokenizer = load_data_tokenizer(byte_level(tmp_path / "tok", "<s>", "</s>"))
    (tmp_path / "rows.jsonl").write_text('{"body": "the river"}\n{"body": null}\n{"body": "of stone"}\n')
    (block,) = read_blocks(tmp_path / "rows.jsonl", tokenizer, 10**6, "body").tolist()
    assert block == [0, *encode_text(tokenizer, "the river"), 0, *encode_text(tokenizer, "of stone")]


def test_a_continuation_keeps_the_space_of_its_first_word(tmp_path: Path) -> None:
    tokenizer = load_data_tokenizer(sentencepiece(tmp_path / "m"))
    model = model_of(tokenizer)
    spaced = 0
    for seed in range(12):
        made = generate_text(model, tokenizer, "the river", 6, Sampling(temperature=1.0), seed=seed)
        assert made.prompt + made.continuation == tokenizer.decode(made.ids, skip_special_tokens=True)
        spaced += made.continuation.startswith(" ")
    assert spaced > 0


def test_tokens_read_as_they_do_inside_a_text(tmp_path: Path) -> None:
    tokenizer = load_data_tokenizer(sentencepiece(tmp_path / "m"))
    ids = encode_text(tokenizer, "the river of stone")
    assert "".join(token_pieces(tokenizer, ids)) == " the river of stone"
    assert token_pieces(tokenizer, [tokenizer.eos_token_id]) == ["</s>"]
    model = model_of(tokenizer)
    assert "".join(trace_bubbles(model, tokenizer, "the river of stone").tokens) == "<s> the river of stone"
    *_, growth = Exhibit("m", model, tokenizer).generate(ids, 1, 3)
    assert "".join(growth.pieces).startswith(" the river of stone")


@pytest.mark.parametrize("kind", [sentencepiece, byte_level, byte_fallback], ids=lambda kind: kind.__name__)
def test_what_is_printed_token_by_token_is_the_text(tmp_path: Path, kind: Callable[[Path], Path]) -> None:
    tokenizer = load_data_tokenizer(kind(tmp_path / "m"))
    text = f"{CORPUS[0]} river{CORPUS[1]} \u77f3 small"
    ids, parts = encode_text(tokenizer, text), list[str]()
    printer = TextPrinter(TokenTable(tokenizer), parts.append)
    printer.put(torch.tensor([[*start_document(tokenizer), *ids[:9]]]))
    for token in ids[9:]:
        printer.put(torch.tensor([token]))
    assert len(parts) > 30
    assert "\ufffd" not in "".join(parts)
    printer.end()
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_nothing_that_was_printed_turns_out_otherwise(tmp_path: Path) -> None:
    """One bad byte spoils the whole run of them that it stands in."""
    tokenizer = load_data_tokenizer(byte_fallback(tmp_path / "m"))
    run, parts = encode_text(tokenizer, "\u00e9")[-2:], list[str]()
    printer = TextPrinter(TokenTable(tokenizer), parts.append)
    for token in [*run, run[0]]:
        printer.put(torch.tensor([token]))
    printer.end()
    assert "".join(parts) == "\ufffd\ufffd\ufffd\n"


def test_bytes_of_half_a_character_are_marked(tmp_path: Path) -> None:
    tokenizer = load_data_tokenizer(byte_level(tmp_path / "tok"))
    ids = encode_text(tokenizer, "a\u77f3b")
    assert token_pieces(tokenizer, ids) == ["a", "\ufffd", "\ufffd", "\ufffd", "b"]
    assert decode_after(tokenizer, ids, 1) == "\u77f3b"
    assert decode_after(tokenizer, ids, 2) == "\u77f3b"  # the character that the border cuts
    assert decode_after(tokenizer, ids, 4) == "b"
    assert decode_after(tokenizer, ids, 5) == ""


def test_a_byte_count_has_the_space_between_the_first_two_words(tmp_path: Path) -> None:
    tokenizer = load_data_tokenizer(sentencepiece(tmp_path / "m"))
    ids = encode_text(tokenizer, "the river of")
    first = len(tokenizer.decode(ids[:1]))
    assert TextSize.of(tokenizer, torch.tensor([ids])).bytes == len("the river of") - first


@pytest.mark.parametrize("answer", ["stone", " stone"])
def test_an_answer_in_its_own_tokens_is_right(tmp_path: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_data_tokenizer(sentencepiece(tmp_path / "m"))
    model, end = model_of(tokenizer), tokenizer.eos_token_id
    batches = make_batches(tokenizer, [Question(1, "the river:", answer, 1)], "rows", 64)

    def say(tokens: list[int]) -> str | None:
        monkeypatch.setattr(model, "generate", lambda ids, **_: torch.cat([ids, torch.tensor([[*tokens, end]])], 1))
        (found,) = answer_questions(model, tokenizer, batches, model.config.exact_budget())
        assert found.right == (found.written == answer)
        return found.written

    assert say(batches[0].answers[0]) == answer
    assert say(encode_text(tokenizer, "bread")) == " bread"
    assert say([tokenizer.unk_token_id, *batches[0].answers[0]]) != answer


def test_the_harness_keeps_the_space_that_a_generation_begins_with(tmp_path: Path) -> None:
    tokenizer = load_data_tokenizer(sentencepiece(tmp_path / "m"))
    lm = adapter()(model_of(tokenizer), tokenizer=tokenizer, batch_size=1)
    assert lm.tok_decode(encode_text(tokenizer, "stone house")) == " stone house"
    assert lm.tok_decode(tokenizer.eos_token_id, skip_special_tokens=False) == "</s>"


def test_a_saved_model_keeps_the_record(tmp_path: Path) -> None:
    tokenizer = load_data_tokenizer(byte_level(tmp_path / "tok", "<s>", "</s>"))
    record_start(tokenizer, tokenizer.eos_token_id)
    model_of(tokenizer).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    assert start_document(load_tokenizer(tmp_path / "m")) == [tokenizer.eos_token_id]
    generated = generate_text(load_model(tmp_path / "m", "cpu"), load_tokenizer(tmp_path / "m"), "", 1)
    assert generated.ids[0] == tokenizer.eos_token_id
