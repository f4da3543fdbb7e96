import json
import shutil
from pathlib import Path

import pytest

from tests.comparison.conftest import tiny_comparison
from tests.run_fixtures import BLOCK
from thoughtbubbles.comparison.runs import Run, RunPlanner
from thoughtbubbles.data import PreparedData
from thoughtbubbles.model.accounting import tokens_at_equal_flops, training_flops
from thoughtbubbles.recipes.training import RecipeError
from thoughtbubbles.recipes.variants import SHIPPED

ALL = "{dense: , " + ", ".join(f"{name}: " for name in SHIPPED if name != "dense") + "}"


def planner(folder: Path, data: PreparedData, *overrides: str, variants: str = ALL) -> RunPlanner:
    return RunPlanner(tiny_comparison(folder, data.path, *overrides, variants=variants))


def _rules(run: Run) -> tuple[str, float, str, str]:
    config = run.config
    return config.routing, float(config.exact_budget()), config.merge, config.attenuation


def test_every_shipped_variant_makes_the_model_that_it_names(tmp_path: Path, tiny_data: PreparedData) -> None:
    runs = {run.variant: run for run in planner(tmp_path, tiny_data, "seeds=[0]").runs({})}
    found = {name: _rules(run) for name, run in runs.items()}
    assert list(found) == list(SHIPPED)
    assert found["budget-1"] == ("causal", 1.0, "residual", "paper")
    assert found["fixed-gates"] == ("causal", 1.0, "residual", "paper")
    assert runs["causal-relative"].config.fork_embedding == "relative"
    assert runs["causal-attended"].config.fork_content == "attended"
    assert runs["fixed-gates"].config.gate_scores == "fixed"
    assert found["copy-root"] == ("copy", 2.0, "root", "paper")
    assert found["copy-average"] == ("copy", 2.0, "residual", "paper")
    assert found["no-attenuation"] == ("causal", 2.0, "residual", "none")
    plain = ("none", "pause", "random", "uniform", "topk")
    assert tuple(found[name][0] for name in ("dense", *plain[1:])) == plain
    assert runs["causal-elastic"].recipe.training.training_budgets == [1, 1.5, 2]
    assert runs["causal"].recipe.training.training_budgets is None
    assert runs["causal-half"].recipe.training.steps == runs["dense-half"].recipe.training.steps == 6


def test_equal_flops_are_found_by_accounting(tmp_path: Path, tiny_data: PreparedData) -> None:
    runs = {run.variant: run for run in planner(tmp_path, tiny_data, "training.steps=400", "seeds=[0]").runs({})}
    causal, dense = runs["causal"], runs["dense-flops"]
    tokens = tokens_at_equal_flops(causal.config, dense.config, BLOCK, 400 * 4 * BLOCK)
    assert dense.recipe.training.steps == pytest.approx(tokens / (4 * BLOCK), abs=1)
    spent = [run.recipe.training.steps * training_flops(run.config, BLOCK) for run in (causal, dense)]
    assert spent[0] == pytest.approx(spent[1], rel=0.5 / 400)


def test_runs_differ_in_what_the_variant_says_and_nothing_else(tmp_path: Path, tiny_data: PreparedData) -> None:
    runs = planner(tmp_path, tiny_data, variants="[dense, causal]").runs({})
    assert [(run.variant, run.seed) for run in runs] == [("dense", 0), ("causal", 0), ("dense", 1), ("causal", 1)]
    dense, causal = (run.recipe.to_dict() for run in runs[:2])
    assert dense["data"] == causal["data"]
    assert {key for key in dense["model"] if dense["model"][key] != causal["model"][key]} == {"routing"}
    assert {key for key in dense["training"] if dense["training"][key] != causal["training"][key]} == {"output"}


def test_tuned_rates_reach_those_that_share_them(
    tmp_path: Path, tiny_data: PreparedData, other_data: PreparedData
) -> None:
    tuning = f"tuning={{learning_rates: [1e-3, 3e-3], data: {other_data.path}, tokens: 0.5}}"
    made = planner(tmp_path, tiny_data, tuning, variants="{dense: , causal: , topk: {rate_of: causal}}")
    tries = made.tuning_runs()
    assert [(run.variant, run.recipe.training.learning_rate) for run in tries] == [
        ("dense", 1e-3),
        ("dense", 3e-3),
        ("causal", 1e-3),
        ("causal", 3e-3),
    ]
    assert {run.recipe.training.steps for run in tries} == {6}
    assert {run.recipe.data.path for run in tries} == {str(other_data.path)}
    rates = {run.variant: run.recipe.training.learning_rate for run in made.runs({"dense": 1e-3, "causal": 3e-3})}
    assert rates == {"dense": 1e-3, "causal": 3e-3, "topk": 3e-3}
    assert len(list(made.describe())) == 3


def test_a_bad_variant_is_refused_before_anything_is_trained(tmp_path: Path, tiny_data: PreparedData) -> None:
    with pytest.raises(RecipeError, match=r"model\.hidden_size=15: expected"):
        planner(tmp_path, tiny_data, variants="{dense: , odd: {model: {hidden_size: 15}}}")


def test_a_model_or_micro_batch_that_cannot_be_is_refused_before_anything_is_made(
    tmp_path: Path, tiny_data: PreparedData
) -> None:
    wide = "{dense: , wide: {model: {hidden_size: 100000000, num_attention_heads: 50000000}}}"
    with pytest.raises(RecipeError, match=r"model\.hidden_size=100000000, .* whose weights take .* GB"):
        planner(tmp_path, tiny_data, variants=wide)
    with pytest.raises(RecipeError, match=r"training\.micro_batch_size=3: expected a divisor of 4"):
        planner(tmp_path, tiny_data, "training.micro_batch_size=3")
    elastic = "{dense: , causal-elastic: {model: {budget: 1e30000000}}}"
    with pytest.raises(RecipeError, match=r"model\.budget='1e30000000': expected a number of streams per token"):
        planner(tmp_path, tiny_data, variants=elastic)
    assert not (tmp_path / "out").exists()


def test_runs_of_a_comparison_compute_in_the_precision_of_the_first(
    tmp_path: Path, tiny_data: PreparedData, finished: RunPlanner
) -> None:
    variants = "[dense, budget-1, copy-root, topk, causal, causal-half]"
    kept = {run.recipe.training.precision for run in planner(tmp_path, tiny_data, variants=variants).runs({})}
    assert kept == {"auto"}
    shutil.copytree(finished.comparison.output, tmp_path / "out")
    recipes = sorted((tmp_path / "out" / "runs").glob("*/*/recipe.yaml"))
    # The first one was asked for by name, and says nothing of the others.
    recipes[0].write_text(recipes[0].read_text().replace("precision: auto", "precision: float32"))
    for each in recipes[1:]:
        facts = json.loads((each.parent / "run.json").read_text())
        (each.parent / "run.json").write_text(json.dumps({**facts, "precision": "bfloat16"}))
    again = planner(tmp_path, tiny_data, variants=variants)
    assert {run.recipe.training.precision for run in again.runs({})} == {"bfloat16"}
    own = "{dense: {training: {precision: float32}}, causal: }"
    mixed = planner(tmp_path, tiny_data, variants=own).runs({})
    assert [run.recipe.training.precision for run in mixed[:2]] == ["float32", "bfloat16"]
