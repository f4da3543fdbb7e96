"""What a run spends beside its steps: loading data, evaluating, starting.

Python's standard library is prepared in a temporary folder and a model of the preset trained on it as `thoughtbubbles
train` does. Loading is set beside a training step, an evaluation beside the bare forward passes over the same blocks,
and the time to the end of the first step is that of a process of its own, imports included.

The last line is JSON: the settings, the machine and the figures.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from thoughtbubbles.data.feed.blocks import collate_blocks
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.recipes.training import load_recipe
from thoughtbubbles.support.files import json_text
from thoughtbubbles.support.machine import describe_machine, device_type
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.support.sampling import spread
from thoughtbubbles.training.configuration import build_config
from thoughtbubbles.training.folder import METRICS_NAME
from thoughtbubbles.training.loop import Loop
from thoughtbubbles.training.run import build_loop, build_model
from thoughtbubbles.training.validation import measure

RECIPE = """
model: {{preset: {preset}, max_position_embeddings: {length}, budget: 2}}
data: {{path: {folder}/data, eval_blocks: {blocks}}}
training:
  output: {folder}/run
  steps: {steps}
  batch_size: {batch}
  log_every: 1
  eval_every: 1_000_000
  save_every: 1_000_000
"""
COMMAND = (sys.executable, "-m", "thoughtbubbles")


def main() -> None:
    """Measure all three."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments)
        found = {
            "seconds_to_first_step": seconds_to_first_step(Path(folder)),
            **in_this_process(Path(folder), arguments),
        }
    for name, value in found.items():
        print(f"{name:<32}{value:.4g}")
    print(json_text({"settings": vars(arguments), "machine": describe_machine(device_type()), **found}))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano", help="shape of the model")
    parser.add_argument("--length", type=int, default=128, help="tokens a block")
    parser.add_argument("--batch-size", type=int, default=32, help="blocks a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=128, help="of an evaluation")
    return parser.parse_args()


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """Data and recipe."""
    command = [*COMMAND, "prepare", str(folder / "data"), "--vocab-size", "2048", "--limit-tokens", "500000"]
    subprocess.run([*command, "--block-size", str(arguments.length)], check=True, capture_output=True)
    fields = {"folder": folder, "batch": arguments.batch_size, **vars(arguments)}
    (folder / "recipe.yaml").write_text(RECIPE.format(**fields))


def seconds_to_first_step(folder: Path) -> float:
    """From the start of the command to the line of its first step."""
    start = time.perf_counter()
    metrics = folder / "first" / METRICS_NAME
    command = [*COMMAND, "train", str(folder / "recipe.yaml"), f"training.output={folder / 'first'}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (metrics.exists() and read_metrics(metrics)):
            time.sleep(0.01)
        taken = time.perf_counter() - start
        process.terminate()
    return taken


def in_this_process(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Loading and evaluation, as seconds and as ratios."""
    recipe = load_recipe(folder / "recipe.yaml")
    data = load_run_data(recipe, progress=False)
    (folder / "run").mkdir()
    loop = build_loop(recipe, build_model(recipe, build_config(recipe, data)), data)
    loop.train()
    rates = [row["tokens_per_second"] for row in read_metrics(folder / "run" / METRICS_NAME) if "loss" in row]
    step = arguments.batch_size * arguments.length / statistics.median(rates[1:])
    load = seconds_to_load(loop)
    bare, evaluation = (statistics.median(times) for times in evaluations(loop, data.eval_rows or arguments.blocks))
    return {
        "step_seconds": step,
        "load_seconds": load,
        "load_share_of_step": load / step,
        "forward_seconds": bare,
        "evaluation_seconds": evaluation,
        "evaluation_times_forward": evaluation / bare,
    }


def seconds_to_load(loop: Loop) -> float:
    """Of the batch of a step."""
    loop.step = 0
    start, batches = time.perf_counter(), 0
    for _ in loop.batches():
        batches += 1
    return (time.perf_counter() - start) / batches * loop.passes


def evaluations(loop: Loop, blocks: int) -> tuple[list[float], list[float]]:
    """Seconds of bare forward passes over the blocks of an evaluation, and of the evaluation, in turn."""
    rows = next(iter(loop.data.validation.values())).rows
    batches = list(
        DataLoader(
            [rows[index] for index in spread(len(rows), blocks)],  # type: ignore[arg-type]
            batch_size=loop.micro_batch_size,
            collate_fn=collate_blocks,
        )
    )
    bare, whole = [], []
    for _ in range(5):
        bare.append(forward(loop, batches))
        start = time.perf_counter()
        measure(loop, blocks)
        whole.append(time.perf_counter() - start)
    return bare[1:], whole[1:]


@torch.no_grad()
def forward(loop: Loop, batches: list[dict[str, Any]]) -> float:
    """Seconds of a forward pass over each batch."""
    start = time.perf_counter()
    loop.model.eval()
    for batch in batches:
        with loop.autocast():
            loss = loop.model(**loop.on_device(batch), return_logits=False).loss
    loss.item()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
