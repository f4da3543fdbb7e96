"""The headline on one GPU: recipes/compare/books-gpu.yaml, the first of its runs first, as many as the time allows.

What docs/results/books-gpu holds of earlier runs on the same data is not trained again and stands in the report beside
the new ones. Several runs share the device, since a small model leaves it waiting for the processor.
"""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from gpu_parts.driver import Item, Setting, run_part
from gpu_parts.kit import DATA_NAME, unpack_folder
from gpu_parts.report import Report
from thoughtbubbles.comparison.measuring import MEASUREMENTS_NAME
from thoughtbubbles.recipes.training import read_sections
from thoughtbubbles.support.files import replacing, write_text
from thoughtbubbles.training.folder import RECIPE_NAME, RUN_NAME, RunSummary

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "compare" / "books-gpu.yaml"
DONE = ROOT / "docs" / "results" / "books-gpu"
AT_A_TIME = 4
ENOUGH = 150.0
"""Seconds in which further runs might be finished."""
PATIENCE = 25.0
"""Seconds for runs to be saved in when the time is over, and for the report."""
TOY: dict[str, dict[str, Any]] = {
    "model": {
        "preset": "nano",
        "num_hidden_layers": 2,
        "fork_layers": [1],
        "hidden_size": 32,
        "num_attention_heads": 2,
    },
    "training": {
        "steps": 2,
        "batch_size": 4,
        "eval_every": 2,
        "save_every": 2,
        "precision": "float32",
        "compile": "none",
    },
    "data": {"eval_blocks": 2, "final_eval_blocks": 2},
    "evaluation": {"blocks": 2, "prefix_blocks": 1, "prefix_positions": 1, "batch_size": 2, "budgets": [1]},
}


def items(setting: Setting) -> Iterator[Item]:
    """The comparison is one item: what it leaves unfinished, a later call goes on with."""
    yield Item("runs", 60 if setting.device == "cuda" else 5, partial(compare, setting))


def compare(setting: Setting) -> dict[str, Any]:
    """Train what is next, a few runs at a time while there is time for more, and report what is finished.

    Raises:
        RuntimeError: if nothing was finished.
    """
    folder, recipe = setting.output / "compare", setting.output / "compare.yaml"
    data = unpack_folder(setting.kit, DATA_NAME, setting.output / DATA_NAME)
    take_over(DONE, folder / "runs", data)
    content = sections(setting, folder, data)
    command = [sys.executable, "-m", "thoughtbubbles", "compare", str(recipe), "--quiet"]
    while chosen := next_runs(content, folder):
        write_text(recipe, yaml.safe_dump({**content, **chosen}, sort_keys=False))
        train([*command, "--jobs", str(AT_A_TIME)], setting.left - PATIENCE)
        if setting.left < ENOUGH or setting.rehearse:
            break
    finished = [str(path.parent.relative_to(folder / "runs")) for path in sorted(measured(folder, "*", "*"))]
    if not finished:
        raise RuntimeError("no run was finished in the time that there was")
    subprocess.run([*command, "--report-only"], check=True)
    keep_smallest(folder, setting.output / "model")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {"finished": finished, "report": report}


def sections(setting: Setting, folder: Path, data: Path) -> dict[str, Any]:
    """The recipe on the kit's data; compiled only where `correct` has seen that it works."""
    content = read_sections(RECIPE)
    correct = Report.read(setting.output / "correct.json")
    works = any(name.startswith("compiled") and name not in correct.failed for name in correct.items)
    layers: list[dict[str, dict[str, Any]]] = [
        {"data": {"path": str(data)}, "training": {"compile": "blocks" if works else "none"}}
    ]
    for layer in [*layers, *([TOY] if setting.rehearse else [])]:
        for section, values in layer.items():
            content[section] = {**content.get(section, {}), **values}
    return {**content, "output": str(folder)}


def next_runs(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The first seed of the recipe that lacks variants, with those it has and the next few; empty where none does.

    Seeds before it stay in the report. Of an earlier seed nothing is missing, so that nothing else is trained.
    """
    variants: dict[str, Any] = content["variants"]
    for number, seed in enumerate(content["seeds"], 1):
        done = [name for name in variants if any(measured(folder, name, f"seed-{seed}"))]
        new = [name for name in variants if name not in done][:AT_A_TIME]
        if new:
            chosen = {
                name: said for name, said in variants.items() if name in (*done, *new, content.get("baseline", "dense"))
            }
            return {"seeds": content["seeds"][:number], "variants": chosen}
    return {}


def measured(folder: Path, variant: str, seed: str) -> Iterator[Path]:
    """Measurements of finished runs; `*` is any."""
    return (folder / "runs").glob(f"{variant}/{seed}/{MEASUREMENTS_NAME}")


def take_over(done: Path, runs: Path, data: Path) -> None:
    """Put the small files of finished runs on the same data where a comparison looks for them."""
    from thoughtbubbles.data.preparation.prepared import load_prepared

    identity = load_prepared(data).manifest.content
    for path in sorted(done.glob(f"*/*/{RUN_NAME}")):
        target = runs / path.parent.relative_to(done)
        if not target.exists() and json.loads(path.read_text(encoding="utf-8"))["data"] == identity:
            shutil.copytree(path.parent, target)
            recipe = yaml.safe_load((target / RECIPE_NAME).read_text(encoding="utf-8"))
            recipe["data"]["path"], recipe["training"]["output"] = str(data), str(target)
            write_text(target / RECIPE_NAME, yaml.safe_dump(recipe, sort_keys=False))


def train(command: list[str], seconds: float) -> None:
    """Train until all is done or the time is over; then have every run saved."""
    process = subprocess.Popen(command)
    try:
        process.wait(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()


def keep_smallest(folder: Path, target: Path) -> None:
    """The trained model of fewest parameters, in bfloat16, small enough to be carried away."""
    from thoughtbubbles.model.loading import load_model

    runs = [path.parent for path in measured(folder, "*", "*") if (path.parent / "model").is_dir()]
    if runs and not target.exists():
        run = min(runs, key=lambda run: RunSummary.read(run).parameters)
        with replacing(target) as partial_folder:
            shutil.copytree(run / "model", partial_folder)
            model = load_model(run)
            torch.nn.Module.to(model, torch.bfloat16)
            model.save_pretrained(partial_folder)


if __name__ == "__main__":
    run_part("compare", items, __doc__)
