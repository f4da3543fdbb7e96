"""The fields of requests: each is served or refused by name, and null is its default."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests import tokenizer_kinds
from tests.serving.conftest import LONGEST, TEMPLATE
from tests.tokenizer_kinds import byte_level
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.data.tokenizer import load_data_tokenizer
from thoughtbubbles.serving.choosing import Choosing
from thoughtbubbles.serving.orders import Order
from thoughtbubbles.serving.refusals import RefusedError
from thoughtbubbles.serving.requests import ChatFields, CompletionFields, read_fields
from thoughtbubbles.serving.served import Limits, ServedModel
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.text import document_ends, encode_text, start_document

HELLO = [{"role": "user", "content": "the river"}]


@pytest.fixture
def served(model: ThoughtbubblesForCausalLM, tokenizer: PreTrainedTokenizerFast) -> ServedModel:
    return ServedModel("tiny", model, tokenizer, limits=Limits(budget=4, answers=200))


def completions(served: ServedModel, **fields: Any) -> list[Order]:
    return served.completions(read_fields(CompletionFields, json.dumps({"prompt": "the", **fields}).encode()))


def chats(served: ServedModel, **fields: Any) -> list[Order]:
    return served.chats(read_fields(ChatFields, json.dumps({"messages": HELLO, **fields}).encode()))


def test_defaults_are_openais(served: ServedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = start_document(tokenizer) + encode_text(tokenizer, "the")
    [order] = completions(served)
    ends = frozenset(document_ends(tokenizer))
    assert order == Order(ids, Fraction(2), 16, Choosing(seed=order.choosing.seed), ends, stops=[])
    [chat] = chats(served)
    assert (chat.most, chat.tail) == (LONGEST - len(chat.ids), "")
    template: Any = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert chat.ids == template
    assert len({completions(served)[0].choosing.seed for _ in range(5)}) == 5


NAMES = [name for name in CompletionFields.model_fields if name != "prompt"]


@pytest.mark.parametrize("name", [*NAMES, "suffix", "best_of", "user", "tools"])
def test_null_is_the_default(served: ServedModel, name: str) -> None:
    [order] = completions(served, **{name: None, "seed": 0})
    assert order == completions(served, seed=0)[0]


def test_fields_have_their_effect(served: ServedModel) -> None:
    first, second = completions(
        served,
        **{"model": "tiny", "budget": "4/3", "max_tokens": 5, "n": 2, "temperature": 0.5, "top_p": 0.25, "top_k": 3},
        **{"presence_penalty": 1, "frequency_penalty": -0.5, "logit_bias": {"7": -100}, "seed": -3, "stop": ["a", "b"]},
        **{"logprobs": 2, "echo": True},
    )
    assert first.choosing == Choosing(0.5, 0.25, 3, 1.0, -0.5, {7: -100.0}, -3, 0, 2)
    assert second.choosing.number == 1
    assert (first.budget, first.most, first.stops, first.echo) == (Fraction(4, 3), 5, ["a", "b"], len(first.ids) - 1)
    [chat] = chats(served, max_completion_tokens=4, logprobs=True, top_logprobs=3, stop="x", budget=1.2)
    assert (chat.most, chat.choosing.alternatives, chat.stops, chat.budget) == (4, 3, ["x"], Fraction(6, 5))


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("the river", [["the river"]]),
        (["the", "river", ""], [["the"], ["river"], [""]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        ([[5, 6], "the"], [[5, 6], ["the"]]),
    ],
)
def test_prompts_are_texts_or_tokens_or_lists_of_either(
    served: ServedModel, tokenizer: PreTrainedTokenizerFast, prompt: Any, tokens: list[list[Any]]
) -> None:
    """What precedes a text is the recorded token; tokens are taken as they are."""
    expected = [
        start_document(tokenizer) + encode_text(tokenizer, each[0]) if isinstance(each[0], str) else each
        for each in tokens
    ]
    assert [order.ids for order in completions(served, prompt=prompt)] == expected
    assert [order.ids for order in completions(served, prompt=prompt, n=2)][::2] == expected


BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": []}, "prompt", "prompt=[]: expected some tokens"),
    ({"prompt": [[5], []]}, "prompt", "prompt[1]=[]: expected some tokens"),
    ({"prompt": {"a": 1}}, "prompt", "expected a text, token ids, or a list"),
    ({"prompt": [5, "a"]}, "prompt", "expected a text, token ids, or a list"),
    ({"prompt": [True]}, "prompt", "expected a text, token ids, or a list"),
    ({"prompt": [-1]}, "prompt", "token -1: expected ids from 0 to 311"),
    ({"prompt": [[3], [312]]}, "prompt", "prompt[1]: token 312: expected ids from 0 to 311"),
    ({"prompt": [5] * 96}, "prompt", "prompt: 96 tokens, expected at most 95 (a row has 96, answer included)"),
    ({"prompt": [5] * 97, "max_tokens": 0}, "prompt", "prompt: 97 tokens, expected at most 96"),
    ({"prompt": "x" * 10000}, "prompt", "prompt: more than 96 tokens, expected at most 95 (a row"),
    ({"budget": 0.5}, "budget", "budget=0.5: expected a number of streams per token from 1"),
    ({"budget": "many"}, "budget", "budget='many': expected a number"),
    ({"budget": True}, "budget", "budget=True: expected"),
    ({"budget": 4.5}, "budget", "budget=4.5: expected at most 4"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens=-1: expected greater than or equal to 0"),
    ({"max_tokens": "5"}, "max_tokens", "max_tokens='5': expected a valid integer"),
    ({"n": 0}, "n", "n=0"),
    ({"n": 129}, "n", "n=129"),
    ({"n": 101, "prompt": ["a", "b"]}, "n", "202 answers in one request: expected at most 200"),
    ({"temperature": -0.1}, "temperature", "temperature=-0.1"),
    ({"temperature": 2.1}, "temperature", "temperature=2.1"),
    ({"top_p": 1.1}, "top_p", "top_p=1.1"),
    ({"presence_penalty": 3}, "presence_penalty", "presence_penalty=3"),
    ({"seed": 2**63}, "seed", "seed=9223372036854775808"),
    ({"seed": 1.5}, "seed", "seed=1.5"),
    ({"stop": ""}, "stop", "stop='': expected at most 16 strings of 1 to 1000 characters"),
    ({"stop": ["a"] * 17}, "stop", "expected at most 16 strings"),
    ({"stop": [1]}, "stop", "stop"),
    ({"logprobs": 21}, "logprobs", "logprobs=21"),
    ({"logprobs": True}, "logprobs", "logprobs=True: expected a valid integer"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "logit_bias: token 'a': expected ids from 0 to 311"),
    ({"logit_bias": {"312": 1}}, "logit_bias", "logit_bias: token '312'"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "101.0 for token 5: expected numbers from -100 to 100"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "expected it with stream=true alone"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "stream_options.x: no field that is served here"),
    ({"suffix": "end"}, "suffix", "suffix='end': not served here"),
    ({"best_of": 3}, "best_of", "best_of=3: not served here"),
    ({"user": "me"}, "user", "user='me': not served here"),
    ({"min_p": 0.1}, "min_p", "min_p: no field that is served here"),
    ({"messages": HELLO}, "messages", "messages: no field that is served here"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD_COMPLETIONS)
def test_what_is_not_served_is_refused_by_name(
    served: ServedModel, fields: dict[str, Any], param: str, words: str
) -> None:
    check_refusal(completions, served, fields, param, words)


def check_refusal(read: Any, served: ServedModel, fields: dict[str, Any], param: str, words: str) -> None:
    """One line names the field and says some words."""
    with pytest.raises(RefusedError) as caught:
        read(served, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "messages=[]"),
    ({"messages": None}, "messages", "messages: expected it, and there is none"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages", "messages[0].role='robot': expected one of system"),
    ({"messages": [{"content": "a"}]}, "messages", "messages[0].role=None"),
    ({"messages": [*HELLO, {"role": "user"}]}, "messages", "messages[1].content=None: expected text"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages", "messages[0].content=5: expected text"),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages", "messages[0].name='b': not served"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        *("messages", "messages[0].content[0]="),
    ),
    ({"tools": [{"type": "function"}]}, "tools", "not served here"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not served here"),
    ({"top_logprobs": 2}, "top_logprobs", "expected it with logprobs=true alone"),
    ({"logprobs": 2}, "logprobs", "logprobs=2: expected a valid boolean"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "expected one of them"),
    ({"echo": True}, "echo", "echo: no field that is served here"),
    ({"messages": [{"role": "user", "content": "the river " * 60}]}, "messages", "tokens, expected at most 95"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD_CHATS)
def test_what_a_chat_does_not_serve_is_refused_by_name(
    served: ServedModel, fields: dict[str, Any], param: str, words: str
) -> None:
    check_refusal(chats, served, fields, param, words)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_of_a_huge_prompt_a_little_is_encoded(
    model: ThoughtbubblesForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Others wait while a text is encoded."""
    tokenizer = load_data_tokenizer(getattr(tokenizer_kinds, kind)(tmp_path))
    tokenizer.chat_template = TEMPLATE.read_text()
    served = ServedModel("tiny", model, tokenizer)
    encoded: list[int] = []

    def encode(tokenizer: Any, text: str) -> list[int]:
        encoded.append(len(text))
        return encode_text(tokenizer, text)

    monkeypatch.setattr("thoughtbubbles.serving.served.encode_text", encode)
    text = "a river, 17 stones; " * 20000
    with pytest.raises(RefusedError, match="prompt: more than 96 tokens, expected at most 95") as caught:
        completions(served, prompt=text)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(RefusedError, match="messages: more than 96 tokens, expected at most 95"):
        chats(served, messages=[{"role": "user", "content": text}])
    assert all(size <= 16 * LONGEST for size in encoded)
    words = "the river of stone " * 4 + "y" * 20
    assert completions(served, prompt=words)[0].ids[-1] == encode_text(tokenizer, words)[-1]


def test_what_asks_for_nothing_is_taken(served: ServedModel) -> None:
    asked = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "seed": 1}
    assert chats(served, **asked) == chats(served, seed=1)
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "river"}]
    said = {"role": "user", "content": parts, "refusal": None, "tool_calls": None, "annotations": []}
    assert chats(served, messages=[said], seed=1) == chats(served, seed=1)
    assert completions(served, best_of=2, n=2, seed=1) == completions(served, n=2, seed=1)


NO_REQUESTS = [
    *(b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 100000),
    *(b'{"seed": 1e999}', b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"),
]


@pytest.mark.parametrize("body", NO_REQUESTS)
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        read_fields(CompletionFields, body)
    assert caught.value.status == 400
    assert len(caught.value.message) < 400


def test_another_model_is_not_found(served: ServedModel) -> None:
    for ask in (completions, chats):
        with pytest.raises(RefusedError) as caught:
            ask(served, model="other")
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_a_tokenizer_without_a_template_has_no_chats(model: ThoughtbubblesForCausalLM, tmp_path: Path) -> None:
    served = ServedModel("tiny", model, load_data_tokenizer(byte_level(tmp_path)))
    with pytest.raises(RefusedError) as caught:
        chats(served)
    assert (caught.value.status, caught.value.code) == (400, "no_chat_template")
    assert "no chat template" in caught.value.message
    assert len(completions(served)) == 1


def test_limits_of_a_server(model: ThoughtbubblesForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    served = ServedModel("tiny", model, tokenizer, budget="1.5", limits=Limits(prompt=10, output=8))
    assert [(order.budget, order.most) for order in completions(served)] == [(Fraction(3, 2), 8)]
    [chat] = ServedModel("tiny", model, tokenizer, limits=Limits(output=8)).chats(
        read_fields(ChatFields, json.dumps({"messages": HELLO}).encode())
    )
    assert chat.most == 8
    for fields, words in (({"max_tokens": 9}, "at most 8"), ({"prompt": [5] * 11}, "11 tokens, expected at most 10")):
        with pytest.raises(RefusedError, match=words):
            completions(served, **fields)
    with pytest.raises(InputError, match=r"budget=2: expected at most 1\.5, the limit"):
        ServedModel("tiny", model, tokenizer, limits=Limits(budget=1.5))
    with pytest.raises(ValueError, match="expected a number of streams"):
        ServedModel("tiny", model, tokenizer, budget="0")


def test_an_answer_ends_with_the_row(served: ServedModel) -> None:
    assert completions(served, prompt=[5] * 90, max_tokens=50)[0].most == 6
    assert completions(served, prompt=[5] * 96, max_tokens=0)[0].most == 0


def test_a_start_is_not_echoed_and_tokens_are(served: ServedModel) -> None:
    [text] = completions(served, prompt="the river", echo=True)
    assert text.echo == len(text.ids) - 1
    assert completions(served, prompt=[5, 6], echo=True)[0].echo == 2


def test_the_models_own_ends_count(model: ThoughtbubblesForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    before = model.generation_config.eos_token_id
    try:
        for given, ends in ((9, {9}), ([9, 11], {9, 11}), (None, set())):
            model.generation_config.eos_token_id = given
            [order] = completions(ServedModel("tiny", model, tokenizer))
            assert order.ends == {*document_ends(tokenizer), *ends}
    finally:
        model.generation_config.eos_token_id = before
