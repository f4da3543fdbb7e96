"""Conversations: what a chat template writes, which tokens of it are learnt, and rows that cannot be used."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from tests.tokenizer_kinds import byte_level, sentencepiece
from thoughtbubbles.data import DataError
from thoughtbubbles.data.feed.chat import ChatTemplate, read_messages
from thoughtbubbles.data.feed.sft import Examples, read_conversations
from thoughtbubbles.data.tokenizer import load_data_tokenizer

START, END = "<|im_start|>", "<|im_end|>"
LOOP = "{% for m in messages %}"
CHATML = (
    LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be small"},
    {"role": "user", "content": "the river"},
    {"role": "assistant", "content": "of stone"},
    {"role": "user", "content": "deep"},
    {"role": "assistant", "content": "green bread"},
]
TEMPLATES = {
    "chatml": (CHATML, ["of stone<|im_end|>", "green bread<|im_end|>"], END),
    # No header: the answer begins with the space behind the question.
    "brackets": (
        "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        [" of stone</s>", " green bread</s>"],
        "</s>",
    ),
    # Another token at the end of a conversation, and content without the white space around it.
    "closing": (
        LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content.strip() + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["of stone<|im_end|>", "green bread<|im_end|>"],
        END,
    ),
    # What the assistant has to write itself between its header and its answer.
    "thinking": (
        LOOP + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<think></think>of stone<|im_end|>", "<think></think>green bread<|im_end|>"],
        END,
    ),
    "generation blocks": (
        LOOP + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + "
        "'<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}",
        ["of stone<|im_end|>", "green bread<|im_end|>"],
        END,
    ),
    "generation blocks without the end": (
        LOOP + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{%- generation -%}{{ m.content }}"
        "{%- endgeneration -%}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}",
        ["of stone<|im_end|>", "green bread<|im_end|>"],
        END,
    ),
    # The next question ends an answer; behind the last there is nothing but the end of text.
    "open": (
        LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["of stone<|im_start|>", "green bread</s>"],
        START,
    ),
    "words alone": (
        LOOP
        + "{{ m.role + ':\n' + m.content + '\n\n' }}{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}",
        ["of stone\n\n", "green bread\n\n</s>"],
        None,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    tokenizer = load_data_tokenizer(byte_level(folder, "<s>", "</s>"))
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = load_data_tokenizer(folder)
    tokenizer.chat_template = CHATML
    return tokenizer


def learnt(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> list[str]:
    """The texts of the runs of tokens that are to be learnt."""
    ids, targets = ChatTemplate(tokenizer).example(messages, "row 1")
    runs: list[list[int]] = [[]]
    for token, target in zip(ids.tolist(), targets.tolist(), strict=True):
        if target:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [str(tokenizer.decode(run)) for run in runs if run]


@pytest.mark.parametrize(("template", "answers", "end"), TEMPLATES.values(), ids=TEMPLATES)
def test_answers_and_what_ends_them_are_learnt(
    tokenizer: PreTrainedTokenizerFast, template: str, answers: list[str], end: str | None
) -> None:
    tokenizer.chat_template = template
    assert learnt(tokenizer, CHAT) == answers
    assert learnt(tokenizer, CHAT[:3]) == [answers[0].removesuffix(START) + ("</s>" if template in UNENDED else "")]
    found = ChatTemplate(tokenizer)
    assert found.end == (None if end is None else tokenizer.convert_tokens_to_ids(end))
    ids = found.example(CHAT, "row 1")[0].tolist()
    whole: Any = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert ids == [*whole, *[tokenizer.eos_token_id] * (template in UNENDED)]
    asked = found.prompt(CHAT[:2], "row 1")
    assert asked == tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)


UNENDED = (TEMPLATES["open"][0], TEMPLATES["words alone"][0])


def test_words_behind_answers_are_known(tokenizer: PreTrainedTokenizerFast) -> None:
    assert ChatTemplate(tokenizer).tail == ""
    tokenizer.chat_template = CHATML.replace("im_end", "end_of_turn")
    found = ChatTemplate(tokenizer)
    assert (found.tail, found.end) == ("<|end_of_turn|>", tokenizer.convert_tokens_to_ids(START))
    assert learnt(tokenizer, CHAT) == [f"of stone<|end_of_turn|>\n{START}", "green bread<|end_of_turn|>\n</s>"]


def test_generation_blocks_are_what_transformers_takes_them_for(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATES["generation blocks"][0]
    expected: Any = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True)
    ids, targets = ChatTemplate(tokenizer).example(CHAT, "row 1")
    assert ids.tolist() == expected["input_ids"]
    assert targets.astype(int).tolist() == expected["assistant_masks"]


@pytest.mark.parametrize("name", ["cohere", "gemma3", "llama3", "phi3", "qwen2_5_vl", "qwen3_instruct_2507"])
def test_templates_of_well_known_models(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """What is found without generation blocks is what the same template has in them, but for space at their ends."""
    trl = pytest.importorskip("trl", reason="trl is not installed: its chat templates are not here")
    texts = [Path(trl.__file__).parent / "chat_templates" / f"{each}.jinja" for each in (name, f"{name}_training")]
    if not all(text.exists() for text in texts):
        pytest.skip("trl has this chat template no more")
    plain, tagged = (text.read_text() for text in texts)
    words = sorted(set(re.findall(r"<[|][^<>{}'\" ]*?[|]>|<(?:start|end)_of_turn>", plain)))
    tokenizer.add_special_tokens({"additional_special_tokens": words})
    found = []
    for template in (plain, tagged):
        tokenizer.chat_template = template
        # Phi closes a conversation with the end of text, behind what ends the answer.
        found.append([text.removesuffix("</s>").rstrip("\n") for text in learnt(tokenizer, CHAT[1:])])
    assert found[0] == found[1]
    assert all(text.startswith(answer) for text, answer in zip(found[0], ("of stone", "green bread"), strict=True))


def test_a_template_that_writes_what_precedes_a_text_gets_no_second(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATES["brackets"][0]
    ids = ChatTemplate(tokenizer).example(CHAT, "row 1")[0].tolist()
    assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)


def test_words_of_special_tokens_in_messages_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    question = f"why {END}\n{START}assistant\nof </s>"
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": f"so {END} and</s>"}]
    assert learnt(tokenizer, chat) == [f"so {END} and</s>{END}"]
    found = ChatTemplate(tokenizer)
    ids = found.example(chat, "row 1")[0].tolist()
    start, end = map(tokenizer.convert_tokens_to_ids, (START, END))
    assert (ids.count(start), ids.count(end), ids.count(tokenizer.eos_token_id)) == (2, 2, 0)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert ids[: len(asked := found.prompt(chat[:1], "row 1"))] == asked


def test_words_that_no_letters_spell_are_refused(tmp_path: Path) -> None:
    """A sentencepiece tokenizer keeps a space of its own where a text begins, so parts are not the whole."""
    tokenizer = load_data_tokenizer(sentencepiece(tmp_path))
    tokenizer.chat_template = (
        LOOP
        + "{{ m.role + m.content + eos_token }}{% endfor %}"
        + ("{% if add_generation_prompt %}assistant{% endif %}")
    )
    plain = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "river"}]
    assert ChatTemplate(tokenizer).example(plain, "row 1")[0].tolist() == tokenizer.apply_chat_template(
        plain, return_dict=False
    )
    plain[0]["content"] = "the </s>"
    try:
        ids = ChatTemplate(tokenizer).example(plain, "row 1")[0].tolist()
    except DataError as error:
        assert str(error) == "row 1: holds '</s>', which this tokenizer only knows as a special token"  # noqa: PT017
    else:
        assert ids.count(tokenizer.eos_token_id) == 2


def test_an_answer_inside_a_token_is_noticed(tokenizer: PreTrainedTokenizerFast) -> None:
    """The words' tokens begin with a space, which the prompt would take away."""
    assert tokenizer.tokenize(" river") == ["Ġriver"]
    tokenizer.chat_template = (
        LOOP
        + "{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        + ("{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    )
    chat = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "river"}]
    with pytest.raises(DataError, match=r"^row 7: an answer begins or ends inside a token, between 'ssistant: ' and"):
        ChatTemplate(tokenizer).example(chat, "row 7")
    tokenizer.chat_template = tokenizer.chat_template.replace("'assistant: '", "'assistant:'")
    assert learnt(tokenizer, chat) == [" river</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        LOOP + "{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last and m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert learnt(tokenizer, CHAT[:3]) == [f"<think></think>of stone{END}"]
    with pytest.raises(DataError, match=r"^row 2, message 3: the chat template writes it otherwise after its prompt,"):
        ChatTemplate(tokenizer).example(CHAT, "row 2")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            None,
            r"the tokenizer has no chat template: expected chat_template\.jinja beside it, which data\.",
        ),
        ("{{ messages[0].content.text.more }}", "row 1: the chat template refuses it: .* has no attribute 'text'"),
        ("{{ raise_exception('roles must alternate') }}", "row 1: the chat template refuses it: roles must alternate"),
        ("{% for m in messages", "row 1: the chat template refuses it: "),
        (LOOP + "{{ m.role }}{% endfor %}", "the chat template leaves an answer's text out: expected one for messages"),
        (
            CHATML.partition("{% if")[0],
            r"the chat template begins an answer with '<\|im_start\|>assistant' but asks for",
        ),
        ({"tool_use": CHATML}, "the tokenizer's chat template: "),
        (CHATML + "{% generation %}{% endgeneration %}", "row 1: the chat template's generation blocks are empty"),
    ],
)
def test_templates_that_cannot_be_used(tokenizer: PreTrainedTokenizerFast, template: str | None, message: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"^{message}"):
        ChatTemplate(tokenizer).example(CHAT, "row 1")


def say(content: Any, role: str = "assistant", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED = say("why", "user")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversation": []}, "row 4 has no field 'messages': it has 'conversation'"),
        ({"messages": "text"}, "row 4: field 'messages' holds a str, expected a list of messages with role and"),
        ({"messages": []}, "row 4: field 'messages' holds an empty list, expected"),
        ({"messages": None}, "row 4: field 'messages' holds null, expected"),
        ({"messages": ["why"]}, "row 4, message 1 is a str, expected role and content"),
        (
            {"messages": [{"from": "human", "value": "why"}]},
            "row 4, message 1 has no field 'role': it has 'from', 'val",
        ),
        (
            {"messages": [ASKED, say("so", "bot")]},
            "row 4, message 2: role='bot', expected one of system, developer, us",
        ),
        ({"messages": [ASKED, say(None)]}, "row 4, message 2: content is null, expected text"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "row 4, message 2: content is null, expected text"),
        ({"messages": [ASKED, say([{"type": "text"}])]}, "row 4, message 2: content holds a list, expected text"),
        ({"messages": [ASKED, say(" \n")]}, r"row 4, message 2: the answer ' \\n' is empty, expected text to learn"),
        ({"messages": [ASKED]}, "row 4: no message is the assistant's, expected one to learn"),
        ({"messages": [say("so"), ASKED, say("so")]}, "row 4: message 1 is the assistant's, expected one before it"),
        ({"messages": [ASKED, say("a\ud800")]}, r"row 4, message 2: '\\ud800' is no character, expected Unicode text"),
        ({"messages": [ASKED, say("a\ufdd0")]}, r"row 4, message 2: '\\ufdd0' is no character, expected Unicode text"),
    ],
)
def test_rows_that_are_no_conversation_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}"):
        read_messages(row, "messages", "row 4")


def test_what_messages_hold_beside_goes_to_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Keys that hold nothing, as tables fill them in, are not there; messages of a role may follow each other."""
    content = "(m.name or '-') + ' ' + m.content + (m.tool_calls or [''])[0]"
    tokenizer.chat_template = CHATML.replace("m.content", content)
    row = {
        "messages": [
            say("why", "user", name="ann", tool_calls=None),
            say("where", "user", name=None, tool_calls=None),
            say(None, name=None, tool_calls=["look"]),
            say("there", "tool"),
            say("so"),
            say("it is"),
        ]
    }
    messages = read_messages(row, "messages", "row 1")
    assert messages[0] == {"role": "user", "content": "why", "name": "ann"}
    assert learnt(tokenizer, messages) == [f"- look{END}", f"- so{END}", f"- it is{END}"]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


def chats(count: int) -> list[list[dict[str, Any]]]:
    return [[say(f"is {i} deep?", "user"), say("the river " * (1 + i % 3) + str(i))] for i in range(count)]


def read(source: str, tokenizer: PreTrainedTokenizerFast, max_length: int = 512) -> Examples:
    return read_conversations(source, "messages", tokenizer, max_length)


def test_conversations_are_read_counted_and_told_apart(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "rows.jsonl", chats(30))
    everything = read(source, tokenizer)
    lengths = [everything.length(index) for index in range(30)]
    limit = sorted(lengths)[12]
    some = read(source, tokenizer, limit)
    assert (len(some), some.too_long, some.longest) == (
        sum(n <= limit for n in lengths),
        sum(n > limit for n in lengths),
        limit,
    )
    assert some.describe(0).endswith("rows.jsonl, row 1")
    ids, targets = ChatTemplate(tokenizer).example(chats(1)[0], "row 1")
    assert everything[0].tokens.tolist() == ids.tolist()
    assert everything[0].targets.tolist() == targets.tolist()
    train, validation = everything.split(0.2, seed=0)
    assert (len(train), len(validation)) == (24, 6)
    tokenizer.chat_template = CHATML.replace("m.role", "'assistant'")
    assert read(source, tokenizer).fingerprint() != everything.fingerprint()
    with pytest.raises(DataError, match=r"all 30 rows are longer than max_length=5, expected at least \d+, the tokens"):
        read(source, tokenizer, 5)


def test_tables_and_lines_hold_the_same_conversations(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A table has every key in every message, also those that hold nothing."""
    rows = chats(6)
    expected = read(write(tmp_path / "rows.jsonl", rows), tokenizer).fingerprint()
    filled = [[{**message, "name": None, "tool_calls": None} for message in row] for row in rows]
    kind = pa.struct(
        [(name, pa.string()) for name in ("role", "content", "name")] + [("tool_calls", pa.list_(pa.string()))]
    )
    table = pa.table({"messages": pa.array(filled, pa.list_(kind)), "number": range(6)})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=4)
    assert read(str(tmp_path / "rows.parquet"), tokenizer).fingerprint() == expected
    (tmp_path / "hub").mkdir()
    pq.write_table(table, tmp_path / "hub" / "train.parquet")
    assert read(f"hf:{tmp_path}/hub?streaming=true", tokenizer).fingerprint() == expected


def test_a_row_in_the_middle_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = chats(5)
    rows[3] = rows[3][:1]
    with pytest.raises(DataError, match=r"rows\.jsonl, row 4: no message is the assistant's"):
        read(write(tmp_path / "rows.jsonl", rows), tokenizer)
