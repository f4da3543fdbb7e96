"""The trained model that a run starts from, and its gates where the recipe changes them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from thoughtbubbles.data import PreparedData
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.recipes.training import Recipe, parse_recipe
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.training.configuration import build_config
from thoughtbubbles.training.run import build_model, train


@pytest.fixture
def model(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))


def recipe_from(model: Path, data: PreparedData, **fields: Any) -> Recipe:
    training = {"output": str(model.parent / "run"), "steps": 1, "batch_size": 2, "learning_rate": 1e-3}
    return parse_recipe(
        {"model": {"pretrained": str(model), **fields}, "data": {"path": str(data.path)}, "training": training}
    )


def start(recipe: Recipe, progress: bool = False) -> ThoughtbubblesForCausalLM:
    return build_model(recipe, build_config(recipe, load_run_data(recipe, progress=False)), progress)


@pytest.mark.parametrize(
    ("fields", "new", "dropped"),
    [
        ({"fork_layers": [0, 2]}, {"model.gates.0."}, {"model.gates.1."}),
        ({"routing": "none"}, set(), {"model.gates.1.", "model.gates.2."}),
        ({"routing": "threshold"}, {"model.gates.1.histogram.", "model.gates.2.histogram."}, set()),
        ({"gate_scores": "fixed"}, set(), {"model.gates.1.norm.", "model.gates.2.projection."}),
        ({"gate_scores": "forks"}, set(), set()),
        ({"gate_start": 0.02}, {"model.gates.1.fork_bias", "model.gates.2.fork_bias"}, set()),
        ({"fork_content": "attended"}, {"model.gates.1.content.", "model.gates.2.content."}, set()),
    ],
    ids=["fork_layers", "none", "threshold", "fixed", "forks", "start", "content"],
)
def test_gates_that_the_recipe_changes_begin_anew(
    model: Path,
    tiny_data: PreparedData,
    fields: dict[str, Any],
    new: set[str],
    dropped: set[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored = load_file(model / "model.safetensors")
    weights = start(recipe_from(model, tiny_data, **fields), progress=True).state_dict()
    fresh = weights.keys() - stored.keys() - {"lm_head.weight"}
    assert all(torch.equal(weights[name], stored[name]) for name in weights.keys() & stored.keys())
    assert all(weights[name].isfinite().all() for name in fresh)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(new | dropped)
    for prefixes, names in ((new, fresh), (dropped, stored.keys() - weights.keys())):
        assert bool(names) == bool(prefixes)
        assert all(name.startswith("model.gates.") and name in said[0] for name in names)
        assert all(any(name.startswith(prefix) for name in names) for prefix in prefixes)
    if said:
        assert said[0].startswith(f"model.pretrained={model}: the recipe changes {next(iter(fields))}: ")


def test_a_run_from_it_says_so_once(model: Path, tiny_data: PreparedData, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_from(model, tiny_data, fork_layers=[0])
    train(recipe)
    said = [line for line in capsys.readouterr().err.splitlines() if "model.gates." in line]
    assert len(said) == 1
    assert "; dropped model.gates.1." in said[0]
    assert ThoughtbubblesForCausalLM.from_pretrained(model.parent / "run" / "model").config.fork_layers == [0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 4}, r"missing: model\.layers\.3\."),
        ({"num_hidden_layers": 4, "fork_layers": [1, 3]}, r"missing: model\.layers\.3\.\S+, .*norm\.weight$"),
        ({"use_bias": False}, r"not expected: model\.gates\.1\.norm\.bias"),
        ({"routing": "pause", "budget": 2}, r"missing: model\.copier\."),
        ({"routing": "pause"}, r"budget=1\.5: expected a whole number"),
        ({"fork_layers": [1, 3]}, r"fork_layers=\[1, 3\]: expected distinct 0-based layers"),
        ({"vocab_size": 400}, r"model\.embed_tokens\.weight: of shape \[\d+, 16\], expected \[400, 16\]"),
    ],
    ids=str,
)
def test_nothing_else_may_change(model: Path, tiny_data: PreparedData, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        start(recipe_from(model, tiny_data, **fields))


def test_a_gate_that_is_damaged_is_not_taken_for_a_changed_one(model: Path, tiny_data: PreparedData) -> None:
    weights = load_file(model / "model.safetensors")
    del weights["model.gates.2.fork_embedding"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing: model\.gates\.2\.fork_embedding$"):
        start(recipe_from(model, tiny_data, fork_layers=[0, 2]))


def test_what_ends_a_generation_of_the_model_is_kept(model: Path, tiny_data: PreparedData) -> None:
    path = model / "generation_config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps({**own, "eos_token_id": [7, own["eos_token_id"]]}))
    recipe = recipe_from(model, tiny_data)
    started = start(recipe)
    assert started.generation_config.eos_token_id == [7, started.config.eos_token_id]


def test_untying_starts_from_the_tied_matrix(model: Path, tiny_data: PreparedData) -> None:
    started = start(recipe_from(model, tiny_data, tie_word_embeddings=False, fork_layers=[0, 2]))
    assert torch.equal(started.lm_head.weight, started.model.embed_tokens.weight)
    assert started.lm_head.weight is not started.model.embed_tokens.weight
    assert json.loads((model / "config.json").read_text())["tie_word_embeddings"]
