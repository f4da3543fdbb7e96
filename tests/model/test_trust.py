"""Code that lies in a folder is never run unasked, and nobody is asked on standard input."""

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.evaluation.benchmark_files import write_benchmarks
from tests.helpers import tiny_model
from tests.tokenizer_kinds import byte_level
from thoughtbubbles.cli import app
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.data.sources.corpora import resolve_source
from thoughtbubbles.data.sources.reading import read_documents
from thoughtbubbles.data.tokenizer import load_data_tokenizer
from thoughtbubbles.evaluation.harness import adapter
from thoughtbubbles.model.loading import load_config, load_model, load_tokenizer
from thoughtbubbles.recipes.training import load_recipe
from thoughtbubbles.support.errors import InputError

CODE = "import pathlib\npathlib.Path({mark!r}).write_text('run')\nclass Theirs:\n    pass\n"


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the code would leave behind."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "mark"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked on standard input, where the answer is yes."""
    questions: list[Any] = []

    def answer(prompt: object = "") -> str:
        questions.append(prompt)
        return "1"

    monkeypatch.setattr(builtins, "input", answer)
    return questions


@pytest.fixture
def model(tmp_path: Path, mark: Path) -> Path:
    """A model whose folder has code of its own for everything that transformers would load by it."""
    folder = byte_level(tmp_path / "model")
    size = len(load_data_tokenizer(folder))
    tiny_model(vocab_size=size, max_position_embeddings=64).save_pretrained(folder)
    (folder / "theirs.py").write_text(CODE.format(mark=str(mark)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)))
    for name, classes in {
        "tokenizer_config.json": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]},
        "config.json": {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Theirs"},
    }.items():
        values = json.loads((folder / name).read_text())
        values["auto_map"] = classes
        if name == "tokenizer_config.json":
            values["tokenizer_class"] = "Theirs"
        (folder / name).write_text(json.dumps(values))
    return folder


LOADERS: dict[str, Callable[[str], Any]] = {
    "tokenizer of a model": load_tokenizer,
    "tokenizer of data": load_data_tokenizer,
    "configuration": load_config,
    "weights": lambda path: load_model(path, "cpu"),
    "harness": lambda path: adapter()(path, device="cpu"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_no_loader_runs_code_or_asks(model: Path, asked: list[Any], mark: Path, name: str) -> None:
    if "tokenizer" in name or name == "harness":
        with pytest.raises(InputError, match="it needs Python code of its own, which is not run: expected one without"):
            LOADERS[name](str(model))
    else:
        LOADERS[name](str(model))
    assert not mark.exists()
    assert asked == []


COMMANDS = {
    "generate": ["{model}"],
    "perplexity": ["{model}", "{work}/text.txt"],
    "inspect": ["{model}", "--text", "the river"],
    "exact-match": ["{model}", "{work}/rows.jsonl"],
    "evaluate": ["{model}", "--tasks", "piqa", "--data-dir", "{work}/tasks", "--output", "{work}/out"],
    "prepare": ["{work}/out", "{work}/text.txt", "--tokenizer", "{model}"],
    "demo": ["{model}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_standard_input_for_consent(
    model: Path, asked: list[Any], mark: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "text.txt").write_text("the river of stone " * 40)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the", "answer": " river", "difficulty": 1}\n')
    write_benchmarks(tmp_path / "tasks")
    words = [word.format(model=model, work=tmp_path) for word in COMMANDS[command]]
    done = CliRunner().invoke(app, [command, *words], input="1\n")
    assert isinstance(done.exception, InputError)
    assert "it needs Python code of its own, which is not run" in str(done.exception)
    assert not mark.exists()
    assert asked == []


@pytest.mark.parametrize("key", ["data.tokenizer", "model.pretrained"])
def test_no_recipe_runs_code(model: Path, asked: list[Any], mark: Path, tmp_path: Path, key: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"p": "the", "c": " river"}\n' * 8)
    data = {"source": str(tmp_path / "rows.jsonl"), "prompt": "{p}", "completion": "{c}"}
    content = {"task": "sft", "model": {}, "data": data, "training": {"output": str(tmp_path / "run"), "steps": 1}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="it needs Python code of its own, which is not run"):
        load_run_data(load_recipe(path, [f"{key}={model}"]), progress=False)
    assert not mark.exists()
    assert asked == []


def test_no_dataset_runs_code(tmp_path: Path, asked: list[Any], mark: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "dataset.py").write_text(CODE.format(mark=str(mark)))
    (folder / "train.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(InputError, match="Dataset scripts are no longer supported"):
        list(read_documents(resolve_source(f"hf:{folder}"), "text"))
    assert not mark.exists()
    assert asked == []
