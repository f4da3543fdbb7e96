"""What is printed for programs is strict JSON: null where there is no number."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.helpers import tiny_model
from tests.tokenizer_kinds import byte_level
from thoughtbubbles.cli import app
from thoughtbubbles.data import prepare
from thoughtbubbles.data.tokenizer import load_data_tokenizer
from thoughtbubbles.model.loading import load_model
from thoughtbubbles.support.files import json_text

TEXT = "the river of stone house under green cloud"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = byte_level(tmp_path_factory.mktemp("model"), "<s>", "</s>")
    size = len(load_data_tokenizer(folder))
    tiny_model(vocab_size=size, max_position_embeddings=64).save_pretrained(folder)
    return folder


def refuse(word: str) -> Any:
    raise AssertionError(f"{word} is not JSON")


def run(*arguments: object, **options: Any) -> str:
    done = CliRunner().invoke(app, [str(word) for word in arguments], catch_exceptions=False, **options)
    assert done.exit_code == 0, done.output
    return done.stdout


def strict(*arguments: object, **options: Any) -> Any:
    """What a command prints with --json."""
    return json.loads(run(*arguments, "--json", **options), parse_constant=refuse)


def test_numbers_that_are_none_become_null() -> None:
    value = {"a": [1.5, math.nan, {"b": math.inf, 3: -math.inf}], "c": ("x", True, None, 2)}
    assert json.loads(json_text(value), parse_constant=refuse) == {
        "a": [1.5, None, {"b": None, "3": None}],
        "c": ["x", True, None, 2],
    }


def test_perplexity_of_one_block_has_no_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (found,) = strict("perplexity", model, tmp_path / "text.txt")
    assert found["standard_error"] is None
    assert found["loss"] > 0


@pytest.mark.parametrize("command", ["generate", "inspect text", "inspect data", "exact-match", "plan"])
def test_every_command_prints_strict_json(model: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the", "answer": " river", "difficulty": 1}\n')
    (tmp_path / "a.txt").write_text(TEXT * 20)
    arguments: dict[str, list[object]] = {
        "generate": ["generate", model, "--prompt", "the", "--max-new-tokens", 2],
        "inspect text": ["inspect", model, "--text", "the"],
        "inspect data": ["inspect", model, "--data", tmp_path / "data", "--blocks", 1],
        "exact-match": ["exact-match", model, tmp_path / "rows.jsonl"],
        "plan": ["plan", model],
    }
    if command == "inspect data":
        prepare(tmp_path / "data", [str(tmp_path / "a.txt")], tokenizer=str(model), block_size=8, progress=False)
    assert strict(*arguments[command])


CONTENTS = {
    "windows line ends": b"the river\r\nof stone\r\n",
    "a mark in front": b"\xef\xbb\xbfthe river",
    "words of a special token": b"the river </s> of",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_prompt_from_a_file_or_standard_input_is_as_it_is(model: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    text = content.decode("utf-8-sig")
    greedy = ("generate", model, "--max-new-tokens", 2, "--temperature", 0)
    found = strict(*greedy, "--file", path)
    assert found["prompt"] == text
    tokenizer = load_data_tokenizer(model)
    assert tokenizer.decode(found["ids"][1 : found["prompt_tokens"]]) == text
    assert not {0, 1} & set(found["ids"][1 : found["prompt_tokens"]])
    assert strict(*greedy, input=content) == strict(*greedy, "--prompt", text) == found


def test_each_row_of_a_file_is_a_prompt(model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "the river"}\n{"q": null}\n{"q": "of stone"}\n')
    said = run("generate", model, "--file", tmp_path / "rows.jsonl", "--text-field", "q", "--json")
    assert [json.loads(line)["prompt"] for line in said.splitlines()] == ["the river", "of stone"]


def test_a_file_that_is_not_utf_8_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    for arguments in (["generate", model, "--file"], ["perplexity", model]):
        done = CliRunner().invoke(app, [str(word) for word in [*arguments, tmp_path / "x.txt"]])
        assert "x.txt is not UTF-8" in str(done.exception)
    done = CliRunner().invoke(app, ["generate", str(model)], input=b"caf\xe9")
    assert "standard input is not UTF-8" in str(done.exception)


def test_documents_of_a_file_are_measured_apart(model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,body\n1,the river\n2,of stone\n")
    (found,) = strict("perplexity", model, tmp_path / "rows.csv", "--text-field", "body")
    tokenizer = load_data_tokenizer(model)
    parts = [tokenizer.encode(text) for text in ("the river", "of stone")]
    assert found["tokens"] == sum(map(len, parts)) + 1
    ids = torch.tensor([[0, *parts[0], 0, *parts[1]]])
    expected = load_model(model, "cpu")(ids, labels=ids).loss.item()
    assert found["loss"] == pytest.approx(expected, abs=1e-4)
