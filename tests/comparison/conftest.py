"""A finished comparison of tiny models, trained in this process."""

from pathlib import Path

import pytest

from tests.run_fixtures import RECIPE
from thoughtbubbles.comparison.measuring import measure_run
from thoughtbubbles.comparison.runs import RunPlanner
from thoughtbubbles.data import PreparedData
from thoughtbubbles.recipes.comparison import Comparison, load_comparison
from thoughtbubbles.training.run import train

SETTINGS = """
output: {output}
title: A tiny comparison
seeds: [0, 1]
variants: {variants}
evaluation:
  blocks: 5
  budgets: [1, 1.5, 3]
  prefix_blocks: 3
  prefix_positions: 2
"""


def write_recipe(folder: Path, data: Path, variants: str = "[dense, budget-1, causal]") -> Path:
    """The recipe of a comparison in `folder`, with its output in `folder`/out."""
    base = RECIPE.format(data=f"{data}\n  eval_blocks: 2\n  final_eval_blocks: 4", output="")
    for old, new in (("  output: \n", ""), ("budget: 1.5", "budget: 2"), ("save_every: 4", "save_every: 12")):
        base = base.replace(old, new)
    path = folder / "compare.yaml"
    path.write_text(base + SETTINGS.format(output=folder / "out", variants=variants))
    return path


def tiny_comparison(
    folder: Path, data: Path, *overrides: str, variants: str = "[dense, budget-1, causal]"
) -> Comparison:
    """A comparison of the tiny run's model."""
    return load_comparison(write_recipe(folder, data, variants), overrides)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_data: PreparedData) -> RunPlanner:
    """All runs but the last seed of the last variant are trained and measured."""
    variants = "[dense, budget-1, copy-root, topk, causal, causal-half]"
    planner = RunPlanner(tiny_comparison(tmp_path_factory.mktemp("comparison"), tiny_data.path, variants=variants))
    for run in planner.runs({})[:-1]:
        train(run.recipe, progress=False)
        measure_run(run.folder, planner.data, planner.comparison.evaluation)
    return planner
