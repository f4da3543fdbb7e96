"""Comparisons on rows of prompts and answers, with questions."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from thoughtbubbles.comparison import pool
from thoughtbubbles.comparison.compare import look
from thoughtbubbles.comparison.measuring import Measurements, measure_run, validation_lots
from thoughtbubbles.comparison.pages import markdown
from thoughtbubbles.comparison.results import Report, build_report
from thoughtbubbles.comparison.runs import RunPlanner
from thoughtbubbles.comparison.tables import difficulty_table, exact_match_table, points
from thoughtbubbles.data.procedural.making import make_task
from thoughtbubbles.data.procedural.tasks import TASKS
from thoughtbubbles.evaluation.answering import read_questions
from thoughtbubbles.evaluation.exact_match import measure_exact_match
from thoughtbubbles.model.loading import load_model
from thoughtbubbles.recipes.comparison import Comparison, parse_comparison
from thoughtbubbles.recipes.training import RecipeError
from thoughtbubbles.support.statistics import Estimate, paired_difference
from thoughtbubbles.training.run import train

SHAPE = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 1, "fork_layers": [1], "budget": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arithmetic, whose rows differ in length, by two seeds."""
    folder = tmp_path_factory.mktemp("rows")
    for seed in (0, 1):
        make_task(TASKS["arithmetic"], folder / str(seed), 200, 2, 20, seed=seed, progress=False)
    return folder


def comparison(rows: Path, output: Path, **sections: Any) -> Comparison:
    """Of tiny models on these rows."""
    data = {
        "source": str(rows / "0" / "train.jsonl"),
        "tokenizer": str(rows / "0" / "tokenizer"),
        "validation_fraction": 0.2,
        "completion": "{answer}",
    }
    training = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "log_every": 2, "eval_every": 6, "save_every": 12}
    return parse_comparison(
        {
            "task": "sft",
            "output": str(output / "out"),
            "seeds": [0, 1],
            "model": SHAPE,
            "data": data,
            "training": training,
            "variants": ["dense", "causal"],
            "evaluation": {
                "blocks": 12,
                "budgets": [1, 1.5],
                "prefix_blocks": 4,
                "questions": str(rows / "0" / "test.jsonl"),
            },
            **sections,
        }
    )


@pytest.fixture(scope="module")
def finished(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> RunPlanner:
    planner = RunPlanner(comparison(rows, tmp_path_factory.mktemp("comparison")))
    for run in planner.runs({}):
        train(run.recipe, progress=False)
        measure_run(run.folder, planner.data, planner.comparison.evaluation)
    return planner


@pytest.fixture(scope="module")
def report(finished: RunPlanner) -> Report:
    return build_report(finished, look(finished))


def measured(planner: RunPlanner, variant: str, seed: int) -> Measurements:
    found = Measurements.read(planner.comparison.output / "runs" / variant / f"seed-{seed}")
    assert found is not None
    return found


def test_losses_are_of_what_is_learnt_of_each_row(finished: RunPlanner) -> None:
    lots = validation_lots(finished.data, 12)
    assert len(lots) > 1
    assert sorted(place for lot in lots for place in lot.places) == list(range(12))
    examples = finished.data.validation["validation"].rows
    chosen = [examples[index * len(examples) // 12] for index in range(12)]
    model = load_model(finished.comparison.output / "runs" / "causal" / "seed-1")
    for budget in (1, 1.5, 2):
        expected = []
        for example in chosen:
            ids = torch.from_numpy(example.tokens.astype("int64"))[None]
            with torch.no_grad():
                logits = model(ids, budget=budget).logits[0, :-1]
            losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")
            expected.append(losses[torch.tensor(example.targets[1:])].mean().item())
        found = measured(finished, "causal", 1).losses[str(Fraction(budget))]
        assert found == pytest.approx(expected, abs=1e-5)


def test_predictions_from_prefixes_are_of_what_is_learnt(finished: RunPlanner) -> None:
    for variant in ("dense", "causal"):
        found = measured(finished, variant, 0).prefix
        assert len(found) == 4
        assert found == pytest.approx([0.0] * 4, abs=1e-5)


def test_questions_are_answered_as_exact_match_answers_them(finished: RunPlanner, rows: Path) -> None:
    source = rows / "0" / "test.jsonl"
    folder = finished.comparison.output / "runs" / "causal" / "seed-0"
    budgets = [Fraction(1), Fraction(3, 2), Fraction(2)]
    asked = measure_exact_match(str(folder), read_questions(source), str(source), budgets, progress=False)
    found = measured(finished, "causal", 0)
    assert list(found.right) == ["1", "3/2", "2"]
    assert [right for budget in found.right.values() for right in budget] == [each.right for each in asked.answers]
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    assert found.difficulties == [line["difficulty"] for line in lines]
    assert list(measured(finished, "dense", 0).right) == ["2"]  # which a dense model takes for 1


def test_a_report_of_questions(finished: RunPlanner, report: Report) -> None:
    right = {
        name: np.array([measured(finished, name, seed).right["2"] for seed in (0, 1)], dtype=float)
        for name in ("dense", "causal")
    }
    found = report.find("causal")
    assert found is not None
    assert found.exact_match is not None
    gap = found.exact_match.to_baseline
    assert gap == paired_difference(right["causal"], right["dense"])
    assert found.exact_match.at_budget["2"] == pytest.approx(right["causal"].mean())
    difficulties = np.array(measured(finished, "causal", 0).difficulties)
    assert found.exact_match.by_difficulty == {
        each: pytest.approx(right["causal"][:, difficulties == each].mean()) for each in (1, 2)
    }
    table = exact_match_table(report)
    assert table.columns[3:] == ["budget 1", "budget 1.5", "budget 2", "minus dense's"]
    dense, causal = table.rows
    assert dense[3].startswith(f"{100 * right['dense'].mean():.1f} ± ")
    assert dense[4:] == ["", "", ""]
    assert causal[5].startswith(f"{100 * right['causal'].mean():.1f} ± ")
    assert causal[6] == points(gap)
    assert difficulty_table(report).columns == ["variant", "difficulty 1", "difficulty 2"]
    text = markdown(report, {})
    assert "## Exact match by difficulty" in text
    assert "what is to be learnt of 12 held-out rows of at most " in text
    assert "all variants of a seed see the same rows in the same order" in text


def test_points_of_a_difference() -> None:
    assert points(Estimate(0.0312, 0.01, 0.0524, 5, 9)) == "+3.1 [+1.0, +5.2]"
    assert points(Estimate(-0.5, -np.inf, np.inf, 1, 1)) == "-50.0"


def test_other_questions_are_asked_anew(finished: RunPlanner, rows: Path, tmp_path: Path) -> None:
    run = finished.runs({})[0]
    evaluation = finished.comparison.evaluation
    assert pool.is_done(run, evaluation)
    source = rows / "0" / "test.jsonl"
    kept = source.read_bytes()
    try:
        source.write_bytes(kept + kept.splitlines(keepends=True)[0])
        assert not pool.is_done(run, evaluation)
    finally:
        source.write_bytes(kept)


def test_rates_are_tuned_on_other_rows(rows: Path, tmp_path: Path) -> None:
    tuning = {"learning_rates": [1e-3, 1e-2], "data": str(rows / "1" / "train.jsonl"), "tokens": 0.5}
    data = comparison(rows, tmp_path).base["data"]
    # Whatever the comparison's rows are validated on, those that tune hold some of their own out.
    named = {**data, "validation_source": str(rows / "0" / "test.jsonl")}
    tries = RunPlanner(comparison(rows, tmp_path, tuning=tuning, data=named)).tuning_runs()
    assert {(run.recipe.data.source, run.recipe.data.validation_source) for run in tries} == {(tuning["data"], None)}
    assert {run.recipe.training.steps for run in tries} == {6}


def test_rows_of_other_words_do_not_tune(rows: Path, tmp_path: Path) -> None:
    tuning = {"learning_rates": [1e-3], "data": str(rows / "0" / "test.jsonl")}
    planner = RunPlanner(comparison(rows, tmp_path, tuning=tuning))
    assert planner.tuning_data is not None  # rows need not be as long as the comparison's
    with pytest.raises(RecipeError, match="expected other data than data"):
        comparison(rows, tmp_path, tuning={**tuning, "data": str(rows / "0" / "train.jsonl")})


def test_equal_flops_on_rows(rows: Path, tmp_path: Path) -> None:
    variants = ["dense", "dense-flops", "looped", "causal"]
    planner = RunPlanner(comparison(rows, tmp_path, variants=variants))
    steps = {run.variant: run.recipe.training.steps for run in planner.runs({})}
    assert steps["dense"] == steps["looped"] == steps["causal"] == 12
    assert 12 < steps["dense-flops"] <= 24
    assert next(planner.describe()).startswith("dense: 12 steps, ")
