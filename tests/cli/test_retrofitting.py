"""The command `retrofit`: a dense model's folder there and back, what it says, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from tests.tokenizer_kinds import CORPUS, byte_level
from thoughtbubbles.cli import app
from thoughtbubbles.data import prepare
from thoughtbubbles.model.loading import load_config, load_model
from thoughtbubbles.recipes.comparison import parse_comparison
from thoughtbubbles.recipes.training import parse_recipe
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.training.run import train


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of four layers with a tokenizer that puts its bos before a text."""
    folder = byte_level(tmp_path_factory.mktemp("dense") / "source", "<s>", "</s>", "<s> $A")
    size = len(AutoTokenizer.from_pretrained(folder))
    config = LlamaConfig(vocab_size=size, hidden_size=16, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(app, ["retrofit", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def refused(*arguments: Any) -> str:
    result = CliRunner().invoke(app, ["retrofit", *map(str, arguments)])
    assert isinstance(result.exception, InputError)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_there_and_back(source: Path, tmp_path: Path) -> None:
    said = run(source, tmp_path / "out", "--fork-layers", "1,3", "--budget", "1.5", "--gate-start", "0.1")
    assert said.startswith("llama, 4 layers of width 16: ")
    assert "in gates before layers 1, 3 (the first is 0); budget 3/2, in " in said
    assert "'<s>' precedes a text, as in the source's tokenizer" in said
    config = load_config(tmp_path / "out")
    assert (config.fork_layers, str(config.exact_budget()), config.gate_start) == ([1, 3], "3/2", 0.1)
    said = run("--back", tmp_path / "out", tmp_path / "back")
    assert f"LlamaForCausalLM in {tmp_path / 'back'}: {tmp_path / 'out'} at budget 1\n" in said
    assert f"It is not {tmp_path / 'out'} at budget 3/2" in said
    assert (tmp_path / "back" / "tokenizer.json").exists()
    before, after = (json.loads((each / "config.json").read_text()) for each in (source, tmp_path / "back"))
    assert before == after


def test_the_same_call_writes_the_same_folder(source: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        run(source, tmp_path / out)
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0.5"], r"budget"),
        (["--fork-layers", "1,x"], r"--fork-layers=1,x: expected layers such as 7,15,23"),
        (["--fork-layers", "9"], r"fork_layers=\[9\]: expected distinct 0-based layers"),
        (["--gate-start", "2"], r"gate_start=2\.0: expected None or a score"),
        (["--data", "somewhere"], r"--data=somewhere: expected it with --back alone"),
        (["--back"], r"model_type is 'llama', expected 'thoughtbubbles'"),
        (["--back", "--fork-layers", "1"], r"--fork-layers=1: expected it without --back"),
    ],
)
def test_bad_input(source: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    assert re.search(message, refused(source, tmp_path / "out", *arguments))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def work(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retrofitted model `out` and data of its tokenizer."""
    folder = tmp_path_factory.mktemp("work")
    run(source, folder / "out", "--gate-start", "0.3")
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    prepare(folder / "data", [str(folder / "docs.jsonl")], tokenizer=str(folder / "out"), block_size=16, progress=False)
    return folder


def trained(work: Path, name: str, model: dict[str, Any], **training: Any) -> Path:
    settings = {"output": str(work / name), "steps": 3, "batch_size": 4, "learning_rate": 1e-2, "eval_every": 3}
    train(
        parse_recipe(
            {
                "model": {"pretrained": str(work / "out"), **model},
                "data": {"path": str(work / "data"), "eval_blocks": 4, "final_eval_blocks": 4},
                "training": {**settings, **training},
            }
        ),
        progress=False,
    )
    return work / name


def test_it_trains_on_and_the_way_back_tells_what_it_costs(work: Path) -> None:
    run_folder = trained(work, "run", {})
    config = load_config(run_folder)
    assert (config.gate_scores, config.gate_start, config.dense_config["model_type"]) == ("forks", 0.3, "llama")
    said = run("--back", run_folder, work / "back", "--data", work / "data")
    losses = re.findall(r"validation loss at budget (\d): ([\d.]+) nats(, that of OUT)?", said)
    assert [(budget, bool(of_out)) for budget, _, of_out in losses] == [("2", False), ("1", True)]
    assert LlamaForCausalLM.from_pretrained(work / "back").config.vocab_size == config.vocab_size


def test_the_dense_model_goes_on_too(work: Path) -> None:
    model = load_model(trained(work, "dense", {"routing": "none"}))
    assert not model.config.gated_layers
    assert "budget 2" not in run("--back", work / "dense", work / "dense-back")


def test_adapters_and_gates_are_trained_over_a_frozen_base(work: Path) -> None:
    pytest.importorskip("peft")
    before = load_model(work / "out").state_dict()
    after = load_model(trained(work, "lora", {}, lora={"rank": 2})).state_dict()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert any(name.endswith("mlp.gate_proj.weight") for name in changed)
    assert any(name.endswith("fork_bias") for name in changed)
    assert not any("norm" in name and "gates" not in name for name in changed)
    assert "model.embed_tokens.weight" not in changed


def test_variants_of_a_comparison_start_from_it(work: Path) -> None:
    comparison = parse_comparison(
        {
            "output": str(work / "compared"),
            "model": {"pretrained": str(work / "out")},
            "data": {"path": str(work / "data")},
            "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
            "variants": {"dense": None, "causal": None, "one": {"like": "budget-1"}, "four": {"model": {"budget": 4}}},
        }
    )
    assert list(comparison.variants) == ["dense", "causal", "one", "four"]
