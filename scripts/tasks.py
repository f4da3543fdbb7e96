"""Train models on a procedural task and tabulate what forks are worth to them: the tables of docs/bubbles.md.

python scripts/tasks.py arithmetic --rows 700000 --steps 6000 makes the rows, trains the variants of recipes/tasks/
arithmetic.yaml, asks each model the test questions and writes table.md, of everything in the folder so far. Finished
parts are not done again.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thoughtbubbles.data.procedural.making import FACTS_NAME, make_task
from thoughtbubbles.data.procedural.tasks import TASKS
from thoughtbubbles.evaluation.answering import read_questions
from thoughtbubbles.evaluation.exact_match import ANSWERS_NAME, measure_exact_match
from thoughtbubbles.recipes.training import load_recipe
from thoughtbubbles.support.files import write_text
from thoughtbubbles.support.statistics import Estimate, paired_difference
from thoughtbubbles.support.tables import Table
from thoughtbubbles.training.folder import RunSummary
from thoughtbubbles.training.run import train

BUDGETS = ["1", "1.5", "2"]
MAX_DIFFICULTY = 4
RECIPES = {"arithmetic": "arithmetic", "arithmetic-small": "arithmetic", "kinship": "kinship", "recall": "recall"}
ANSWERS = f"exact-match/{ANSWERS_NAME}"


@dataclass(frozen=True)
class Variant:
    """A model to train: what it says otherwise than the recipe, and for how many times the steps."""

    title: str
    overrides: Sequence[str]
    steps: float = 1.0
    budgets: Sequence[str] = ("2",)


VARIANTS = {
    "dense": Variant("dense", ["model.routing=none"], budgets=["1"]),
    "longer": Variant("dense, 1.85 times the steps", ["model.routing=none"], 1.85, ["1"]),
    "copy": Variant("Copy-2", ["model.routing=copy"]),
    "random": Variant("random forks, roots whole", ["model.routing=random", "model.gate_scores=forks"], 1.0, BUDGETS),
    "causal": Variant("causal, budget 2", [], budgets=BUDGETS),
    "forks": Variant("causal, roots whole", ["model.gate_scores=forks"], budgets=BUDGETS),
    "quarter": Variant(
        "causal, roots whole, budget 1.25", ["model.gate_scores=forks", "model.budget=1.25"], budgets=BUDGETS
    ),
}
BASELINE = "dense"


@dataclass(frozen=True)
class Result:
    """A variant's runs.

    Attributes:
        variant: what was trained.
        training_flops: of one run.
        right: for each seed and budget, which questions were answered right, [questions].
    """

    variant: Variant
    training_flops: float
    right: dict[int, dict[str, npt.NDArray[np.float64]]]

    def at(self, budget: str, seeds: Iterable[int]) -> npt.NDArray[np.float64]:
        """Which were answered right at a budget, [seeds, questions]."""
        return np.stack([self.right[seed][budget] for seed in seeds])


def main() -> None:
    """Make the rows, train, ask, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", choices=sorted(RECIPES), help="of recipes/tasks")
    parser.add_argument("--rows", type=int, help="of training, to be made [100000]")
    parser.add_argument("--steps", type=int, default=2000, help="of 64 rows [%(default)s]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="to train each variant with [0]")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), help="[all]")
    parser.add_argument("--output", type=Path, help="folder for rows, runs and table.md [runs/tasks/RECIPE-STEPS]")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another override for all variants"
    )
    options = parser.parse_args()
    output = options.output or Path("runs/tasks") / f"{options.recipe}-{options.steps}"
    if not (output / "rows").exists():
        make_task(TASKS[RECIPES[options.recipe]], output / "rows", options.rows or 100_000, MAX_DIFFICULTY)
    elif options.rows:
        made = json.loads((output / "rows" / FACTS_NAME).read_text(encoding="utf-8"))["examples"]
        if made != options.rows:
            parser.error(f"--rows {options.rows}: {output / 'rows'} has {made}; expected as many, or another --output")
    overrides = [f"data.source={output}/rows/train.jsonl", f"data.tokenizer={output}/rows/tokenizer", *options.set]
    for seed in options.seeds:
        for name in options.variants:
            run, variant = output / f"{name}-{seed}", VARIANTS[name]
            steps = round(variant.steps * options.steps)
            recipe = Path("recipes/tasks") / f"{options.recipe}.yaml"
            train(load_recipe(recipe, [*overrides, *variant.overrides, *of_run(run, steps, seed)]))
            ask(run, output / "rows", variant)
    table = tabulated({name: found for name in VARIANTS if (found := read_result(name, output)).right}).markdown()
    write_text(output / "table.md", table + "\n")
    print(table)


def of_run(run: Path, steps: int, seed: int) -> list[str]:
    """Overrides of a single run: where it lies, how long it is."""
    settings = {"output": run, "steps": steps, "seed": seed, "eval_every": steps // 4, "save_every": steps // 4}
    return [f"training.{key}={value}" for key, value in settings.items()]


def ask(run: Path, rows: Path, variant: Variant) -> None:
    """Write what a trained model answers to the test questions."""
    source = rows / "test.jsonl"
    if not (run / ANSWERS).exists():
        budgets = [Fraction(budget) for budget in variant.budgets]
        measure_exact_match(str(run), read_questions(source), str(source), budgets).write((run / ANSWERS).parent)


def read_result(name: str, output: Path) -> Result:
    """Of a variant, all seeds that were asked."""
    runs = sorted(path.parents[1] for path in output.glob(f"{name}-*/{ANSWERS}"))
    flops = float(np.mean([RunSummary.read(run).training_flops for run in runs])) if runs else 0.0
    right = {}
    for run in runs:
        rows = [json.loads(line) for line in (run / ANSWERS).read_text(encoding="utf-8").splitlines()]
        right[int(run.name.removeprefix(f"{name}-"))] = {
            budget: np.array([float(row["right"]) for row in rows if row["budget"] == budget])
            for budget in VARIANTS[name].budgets
        }
    return Result(VARIANTS[name], flops, right)


def tabulated(results: dict[str, Result]) -> Table:
    """A row a variant: exact match in % by test budget, and at the last against the baseline's."""
    columns = ["", "seeds", "training FLOPs", *(f"budget {budget}" for budget in BUDGETS), f"minus {BASELINE}'s"]
    rows, baseline = [], results.get(BASELINE)
    for name, result in results.items():
        budgets = result.variant.budgets
        shares = {budget: 100 * result.at(budget, result.right).mean() for budget in budgets}
        shared = sorted(result.right.keys() & baseline.right.keys()) if baseline else []
        difference = ""
        if baseline and shared and name != BASELINE:
            theirs = baseline.at(baseline.variant.budgets[-1], shared)
            difference = interval(paired_difference(result.at(budgets[-1], shared), theirs))
        cells = (f"{shares[budget]:.1f}" if budget in shares else "" for budget in BUDGETS)
        rows.append([result.variant.title, str(len(result.right)), f"{result.training_flops:.3g}", *cells, difference])
    note = (
        "Exact match in %, means over seeds. Differences in points at the last budget shown, over the seeds that both "
        "have; in brackets 95% intervals over questions and, of several seeds, over these."
    )
    return Table("", columns, rows, note)


def interval(difference: Estimate) -> str:
    """In points."""
    return f"{100 * difference.mean:+.1f} ({100 * difference.low:.1f} to {100 * difference.high:.1f})"


if __name__ == "__main__":
    main()
