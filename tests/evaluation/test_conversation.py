"""Talking with a model: `generate --chat`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.cli.test_commands import fail, run
from tests.helpers import tiny_model
from tests.tokenizer_kinds import byte_level
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.cli import app
from thoughtbubbles.data.tokenizer import load_data_tokenizer
from thoughtbubbles.evaluation.conversation import Chat
from thoughtbubbles.evaluation.generation import Decoding, Sampling
from thoughtbubbles.evaluation.harness import adapter
from thoughtbubbles.model.loading import load_model, load_tokenizer
from thoughtbubbles.support.errors import InputError

TEMPLATE = Path(__file__).parents[2] / "recipes" / "chat.jinja"
GREEDY = Decoding(12, Sampling(temperature=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with a chat template; it writes words alone."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = load_data_tokenizer(byte_level(folder, "<s>", "</s>"))
    tokenizer.chat_template = TEMPLATE.read_text()
    tokenizer.save_pretrained(folder)
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=96)
    for token in range(len(tokenizer)):
        if len(tokenizer.decode([token]).strip()) < 3:
            model.model.embed_tokens.weight.data[token] *= 0.1
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder: Path) -> ThoughtbubblesForCausalLM:
    return load_model(folder, "cpu")


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(folder)


def written(
    model: Any, tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], count: int = 12
) -> list[int]:
    """The greedy tokens after a conversation, each from a pass over all before it."""
    ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return list(ids)


def test_every_turn_is_an_answer_to_the_whole_conversation(model, tokenizer) -> None:
    chat = Chat(model, tokenizer, GREEDY, system="be small")
    messages = [{"role": "system", "content": "be small"}]
    for question in ("the river", "of stone"):
        messages.append({"role": "user", "content": question})
        made = chat.ask(question)
        assert made.ids == written(model, tokenizer, messages)
        answer = tokenizer.decode(made.ids[made.prompt_tokens :], skip_special_tokens=True).strip()
        assert (made.prompt, made.continuation) == (question, answer)
        messages.append({"role": "assistant", "content": answer})
        assert chat.messages == messages
    chat.reset()
    assert chat.messages == messages[:1]
    assert chat.ask("the river").ids == written(model, tokenizer, messages[:2])


@pytest.mark.parametrize("where", ["template", "configuration", "eos"])
def test_an_answer_ends_where_the_template_or_the_model_ends_it(model, tokenizer, where: str) -> None:
    varied = Decoding(12, Sampling(temperature=0, repetition_penalty=50.0))
    made = Chat(model, tokenizer, varied).ask("the")
    ids, start = made.ids, made.prompt_tokens
    last = ids[start + 4]
    assert last not in ids[: start + 4]
    word = tokenizer.convert_ids_to_tokens(last)
    if where == "template":
        tokenizer.add_special_tokens({"additional_special_tokens": [word]})
        tokenizer.chat_template = tokenizer.chat_template.replace("eos_token if", f"{word!r} if")
    elif where == "configuration":
        model.generation_config.eos_token_id = [last, 5]
    else:
        tokenizer.eos_token = word
    assert Chat(model, tokenizer, varied).ask("the").ids == ids[: start + 5]


def test_an_answer_is_said_as_it_comes_and_nothing_else(model, tokenizer) -> None:
    chat, said = Chat(model, tokenizer, GREEDY), list[str]()
    made = chat.ask("the river", chat.printer(said.append))
    assert "".join(said).strip() == made.continuation
    assert len(said) > 3


def test_a_long_conversation_forgets_its_beginning_and_warns_once(model, tokenizer) -> None:
    warnings: list[str] = []
    chat = Chat(model, tokenizer, GREEDY, system="be small", warn=warnings.append)
    for number in range(5):
        made = chat.ask(f"the river {number}")
        assert len(made.ids) <= 96
        assert made.prompt_tokens <= 96 - 12
    assert made.ids == written(model, tokenizer, chat.messages[:-1])
    assert warnings == ["the conversation is longer than the row of 96 tokens: its beginning is left out"]
    assert chat.messages[0]["role"] == "system"
    assert chat.messages[1]["content"] not in ("the river 0", "the river 1")
    assert chat.messages[-2]["content"] == "the river 4"
    before = list(chat.messages)
    with pytest.raises(InputError, match=r"message of \d+ tokens, with what the template adds: expected at most 95"):
        chat.ask("zq" * 60)
    assert chat.messages == before


def test_words_of_special_tokens_that_are_typed_are_text(model, tokenizer) -> None:
    made = Chat(model, tokenizer, GREEDY).ask("the </s> of")
    assert made.ids[: made.prompt_tokens].count(tokenizer.eos_token_id) == 0


COMMON = ("--max-new-tokens", "8", "--temperature", "0")


def talk(folder: Path, lines: str, *more: str) -> list[str]:
    """Standard output of a talk, and of standard error."""
    result = CliRunner().invoke(app, ["generate", str(folder), "--chat", *COMMON, *more], input=lines)
    assert result.exit_code == 0, result.output
    return [result.stdout, result.stderr]


def test_lines_are_turns(folder: Path, model, tokenizer) -> None:
    chat = Chat(model, tokenizer, Decoding(8, GREEDY.sampling))
    answers = [chat.ask(question).continuation for question in ("the river", "of stone")]
    assert answers[0] != answers[1]
    out, _ = talk(folder, "the river\n\nof stone\n/reset\nthe river\n/exit\nof stone\n")
    assert out == "".join(f"{answer}\n" for answer in (*answers, answers[0]))
    assert talk(folder, "the river")[0] == f"{answers[0]}\n"


def test_a_prompt_is_one_turn(folder: Path, model, tokenizer) -> None:
    expected = Chat(model, tokenizer, Decoding(8, GREEDY.sampling), system="be small").ask("the river")
    arguments = ("generate", folder, "--chat", "--prompt", "the river", "--system", "be small", *COMMON)
    assert run(*arguments) == f"{expected.continuation}\n"
    made = json.loads(run(*arguments, "--json", "--show-bubbles", "--budget", 2))
    assert (made["prompt"], made["prompt_tokens"]) == ("the river", expected.prompt_tokens)
    assert len(made["bubbles"]) == len(made["ids"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--system", "be small", "--prompt", "a"],
            "--chat: expected it without --interactive and --file, and --system",
        ),
        (["--chat", "--interactive"], "--chat: expected it without --interactive and --file"),
        (["--chat", "--file", "a.txt"], "--chat: expected it without --interactive and --file"),
        (["--chat", "--prompt", "zq" * 60], "expected at most 95"),
        (["--chat", "--prompt", "a\udcff"], "--prompt: expected text in UTF-8"),
        (["--chat", "--system", "a\udcff"], "--system: expected text in UTF-8"),
    ],
)
def test_bad_input_is_one_line(folder: Path, capsys, monkeypatch, arguments: list[str], message: str) -> None:
    assert message in fail(capsys, monkeypatch, "generate", folder, *arguments)


def test_a_chat_needs_a_template(tiny_run: Path, capsys, monkeypatch) -> None:
    line = fail(capsys, monkeypatch, "generate", tiny_run, "--chat", "--prompt", "a")
    assert "the tokenizer has no chat template: expected chat_template.jinja beside it" in line


def test_the_harness_ends_answers_there_too(model, tokenizer) -> None:
    word = tokenizer.convert_ids_to_tokens(300)
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token if", f"{word!r} if")
    lm = adapter()(model, tokenizer=tokenizer, batch_size=1)
    assert lm._ends() == [tokenizer.eos_token_id]
    lm.apply_chat_template([{"role": "user", "content": "the"}])
    assert lm._ends() == [tokenizer.eos_token_id, 300]
