"""`make lookup`: dense, copied and forked models on the generated task `lookup`, over seeds, at every test budget.

Finished runs are not done again. What docs/results.md shows is written to runs/lookup/results.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from thoughtbubbles.accounting import training_flops
from thoughtbubbles.configuration import ThoughtbubblesConfig
from thoughtbubbles.data.procedural import TASKS, make_task
from thoughtbubbles.loading import load_config
from thoughtbubbles.machine import describe_machine

RECIPE = Path("recipes/tasks/lookup.yaml")
OUTPUT = Path("runs/lookup")
BUDGETS = ("1", "1.5", "2", "3", "4")
ROW = 12  # tokens: the start, the prompt, the answer
STEPS = 800
ONE_LAYER = ("model.gate_scores=forks", "model.fork_layers=[0]")
VARIANTS: dict[str, tuple[str, ...]] = {
    "dense": ("model.routing=none",),
    "dense, FLOPs of Copy-2": ("model.routing=none",),
    "Copy-2": ("model.routing=copy",),
    "causal 2": (),
    "causal 2, roots whole": ("model.gate_scores=forks",),
    "causal 2, roots whole, forks at the input": ONE_LAYER,
    "causal 1.5, roots whole, forks at the input": ("model.budget=1.5", *ONE_LAYER),
    "random 1.5, roots whole, forks at the input": ("model.budget=1.5", "model.routing=random", *ONE_LAYER),
}


def main() -> None:
    """Make the task, train and measure every variant and seed, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each")
    parser.add_argument("--seeds", type=int, default=3, help="of every variant")
    options = parser.parse_args()
    if not (OUTPUT / "task").exists():
        make_task(TASKS["lookup"], OUTPUT / "task", examples=300_000, max_difficulty=8, test_examples=500)
    places = [(name, seed) for seed in range(options.seeds) for name in VARIANTS]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda place: run(*place), places))
    rows = [row(name, options.seeds) for name in VARIANTS]
    results = {"seeds": options.seeds, "machine": describe_machine(), "rows": rows}
    (OUTPUT / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results))


def run(name: str, seed: int) -> None:
    """Train one model and ask it every question, in processes of their own."""
    folder = place_of(name, seed)
    data = [f"data.source={OUTPUT}/task/train.jsonl", f"data.tokenizer={OUTPUT}/task/tokenizer"]
    steps = STEPS * (equal_flops() if "FLOPs" in name else 1)
    training = [f"training.seed={seed}", f"training.steps={steps:.0f}", f"training.output={folder}"]
    command(folder, "train", str(RECIPE), *VARIANTS[name], *data, *training)
    if not (folder / "exact-match" / "exact_match.json").exists():
        questions, budgets = str(OUTPUT / "task" / "test.jsonl"), ",".join(budgets_of(folder))
        output = str(folder / "exact-match")
        command(folder, "exact-match", str(folder), questions, "--budget", budgets, "--output", output)


def equal_flops() -> float:
    """How many times as many tokens a dense model sees for the training FLOPs of Copy-2."""
    return flops_per_token("copy", 2) / flops_per_token("none", 1)


def flops_per_token(routing: str, budget: float) -> float:
    """Of training, for a model of the recipe's shape."""
    shape = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["model"]
    words = len(TASKS["lookup"].words) + 2
    config = ThoughtbubblesConfig(**{**shape, "vocab_size": words, "routing": routing, "budget": budget})
    return training_flops(config, ROW) / ROW


def command(folder: Path, *arguments: str) -> None:
    """Run the command line on one thread, its words kept beside the run's folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.log").open("a", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, "-m", "thoughtbubbles", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}, see {log.name}")


def place_of(name: str, seed: int) -> Path:
    """The folder of a run."""
    return OUTPUT / "runs" / name.replace(", ", "-").replace(" ", "-").lower() / f"seed-{seed}"


def budgets_of(folder: Path) -> Sequence[str]:
    """At which budgets a model can be asked."""
    routing = load_config(folder).routing
    return {"none": ("1",), "copy": ("2",)}.get(routing, BUDGETS)


def row(name: str, seeds: int) -> dict[str, Any]:
    """Exact match of a variant: means and standard deviations over seeds."""
    folders = [place_of(name, seed) for seed in range(seeds)]
    found = [
        json.loads((folder / "exact-match" / "exact_match.json").read_text(encoding="utf-8")) for folder in folders
    ]
    config, summary = load_config(folders[0]), json.loads((folders[0] / "summary.json").read_text(encoding="utf-8"))
    values: dict[str, dict[str, list[float]]] = {}
    for scores in (each["scores"] for each in found):
        for score in scores:
            difficulty = "all" if score["difficulty"] is None else str(score["difficulty"])
            values.setdefault(score["budget"], {}).setdefault(difficulty, []).append(score["value"])
    return {
        "variant": name,
        "own_budget": budgets_of(folders[0])[0] if config.routing in ("none", "copy") else f"{float(config.budget):g}",
        "training_flops": summary["training_flops"],
        "exact_match": {
            budget: {difficulty: [statistics.mean(v), spread(v)] for difficulty, v in scores.items()}
            for budget, scores in values.items()
        },
    }


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation; None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


if __name__ == "__main__":
    main()
