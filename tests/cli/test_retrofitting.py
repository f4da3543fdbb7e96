"""The command `retrofit`: a dense model's folder there and back, what it says, and what it refuses."""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from tests.tokenizer_kinds import CORPUS, byte_level
from thoughtbubbles.cli import app
from thoughtbubbles.comparison.runs import RunPlanner
from thoughtbubbles.data import prepare
from thoughtbubbles.model.loading import load_config, load_model
from thoughtbubbles.recipes.comparison import load_comparison
from thoughtbubbles.recipes.training import Recipe, parse_recipe
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.training.run import train
from thoughtbubbles.training.session import Callback, Session


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


class Kill(Callback):
    """Ends the training behind step 2, like a crash."""

    def on_step_end(self, session: Session) -> None:
        if session.step == 2:
            raise KeyboardInterrupt


def recipe_from(work: Path, name: str, model: dict[str, Any], **training: Any) -> Recipe:
    settings = {"output": str(work / name), "steps": 3, "batch_size": 4, "learning_rate": 1e-2, "eval_every": 3}
    return parse_recipe(
        {
            "model": {"pretrained": str(work / "out"), **model},
            "data": {"path": str(work / "data"), "eval_blocks": 4, "final_eval_blocks": 4},
            "training": {**settings, **training},
        }
    )


def trained(work: Path, name: str, model: dict[str, Any], **training: Any) -> Path:
    train(recipe_from(work, name, model, **training), progress=False)
    return work / name


@pytest.mark.parametrize("routing", ["causal", "none"])
def test_it_goes_on_as_if_never_interrupted(work: Path, routing: str) -> None:
    whole = trained(work, f"whole-{routing}", {"routing": routing}, save_every=1)
    killed = recipe_from(work, f"killed-{routing}", {"routing": routing}, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(killed, progress=False, callbacks=[Kill()])
    train(killed, progress=False)
    one, two = (load_model(folder).state_dict() for folder in (whole, work / f"killed-{routing}"))
    assert all(one[name].equal(two[name]) for name in one)


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
    overrides = [f"output={work / 'compared'}", f"model.pretrained={work / 'out'}", f"data.path={work / 'data'}"]
    runs = {
        run.variant: run for run in RunPlanner(load_comparison("recipes/compare/retrofit.yaml", overrides)).runs({})
    }
    budgets = {name: int(run.config.exact_budget()) for name, run in runs.items() if run.config.gated_layers}
    assert budgets == {"budget-1": 1, "causal": 2, "causal-4": 4, "gates-alone": 2, "lora": 2}
    assert not runs["dense"].config.gated_layers
    assert all(run.config.dense_config["model_type"] == "llama" for run in runs.values())
    names = {"lm_head.weight", *load_model(work / "out").state_dict()}
    frozen = runs["gates-alone"].recipe.training.freeze
    left = {name for name in names if not any(fnmatchcase(name, pattern) for pattern in frozen)}
    assert left == {name for name in names if name.startswith("model.gates.")}
