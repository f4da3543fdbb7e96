"""Training of this checkout against another one's: whole commands in pairs, in one run."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from thoughtbubbles.support.metrics import read_metrics

HERE = Path(__file__).parents[1]
RECIPE = HERE / "recipes" / "demo.yaml"
QUIET = "1_000_000"


def compare_checkouts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the demo's recipe in both, pair by pair, and the ratios of this one to the other."""
    checkouts = {"this": HERE, "other": Path(arguments.against).resolve()}
    rates: dict[str, list[float]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        prepare = ["prepare", f"{folder}/data", "--vocab-size", "2048", "--block-size", "128"]
        run(HERE, *prepare, "--limit-tokens", "1_000_000", "--validation-fraction", "0.03")
        for pair in range(arguments.pairs):
            # In turn first and second, so that a machine which warms up favours neither.
            for name in sorted(checkouts, reverse=pair % 2 == 1):
                rates[name].append(rate(checkouts[name], Path(folder), f"{name}-{pair}", arguments.steps))
            print(f"pair {pair + 1}: {rates['this'][-1]:,.0f} and {rates['other'][-1]:,.0f} tokens/s")
    ratios = [ours / theirs for ours, theirs in zip(rates["this"], rates["other"], strict=True)]
    print(f"this over the other: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    return {"tokens_per_second": rates, "ratios": ratios, "ratio": statistics.median(ratios)}


def rate(checkout: Path, folder: Path, name: str, steps: int) -> float:
    """Tokens per second of a run of the demo's recipe, its first steps left out."""
    fields = {"output": folder / name, "steps": steps, "log_every": 4, "eval_every": QUIET, "save_every": QUIET}
    overrides = [f"training.{key}={value}" for key, value in fields.items()]
    run(checkout, "train", str(RECIPE), f"data.path={folder / 'data'}", "data.final_eval_blocks=1", *overrides)
    rows = [row for row in read_metrics(folder / name / "metrics.jsonl") if "loss" in row]
    return float(statistics.median(row["tokens_per_second"] for row in rows[1:]))


def run(checkout: Path, *command: str) -> None:
    """A command of a checkout, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    subprocess.run([sys.executable, "-m", "thoughtbubbles", *command], check=True, capture_output=True, env=environment)
