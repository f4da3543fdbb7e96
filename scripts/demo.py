"""`make demo`: train a dense and a Thoughtbubbles model on the same text and show both.

Finished parts are not done again; a run that was interrupted goes on from its last checkpoint.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from thoughtbubbles.data import load_prepared, prepare
from thoughtbubbles.evaluation.generation import Sampling, generate_text
from thoughtbubbles.evaluation.perplexity import Perplexity, evaluate_perplexity
from thoughtbubbles.inspection.bubbles import bubble_sizes
from thoughtbubbles.inspection.plots import plot_bubbles, plot_losses
from thoughtbubbles.loading import load_model, load_tokenizer
from thoughtbubbles.training.recipe import load_recipe
from thoughtbubbles.training.run import RunSummary, train

RECIPES = {"dense": Path("recipes/demo-dense.yaml"), "Thoughtbubbles": Path("recipes/demo.yaml")}
OUTPUT = Path("runs/demo")
PROMPT = "def read_file(path):\n"
PASSAGE_TOKENS = 96


def main() -> None:
    """Prepare, train, compare, sample, draw."""
    start = time.monotonic()
    console = Console()
    prepare(OUTPUT / "data", vocab_size=2048, block_size=128, validation_fraction=0.03)
    summaries = {label: train(load_recipe(path)) for label, path in RECIPES.items()}
    show_table(console, summaries)
    at_one = evaluate_perplexity(load_model(OUTPUT / "bubbles"), validation_blocks(), budget=1, batch_size=32)
    show_verdict(console, summaries, at_one)
    show_sample(console)
    draw()
    results = {label: asdict(summary) for label, summary in summaries.items()}
    results["Thoughtbubbles at test budget 1"] = asdict(at_one)
    (OUTPUT / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"\nIn {OUTPUT}: loss.png, bubbles.png, results.json, and each run's metrics, checkpoints and model.")
    console.print(f"Done in {(time.monotonic() - start) / 60:.1f} minutes.")


def show_table(console: Console, summaries: dict[str, RunSummary]) -> None:
    """One row a model."""
    table = Table(title="Python's standard library, held-out files, one seed")
    table.add_column("", no_wrap=True)
    for column in ("parameters", "training\ntokens", "validation\nperplexity", "tokens/s", "training\nFLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, run in summaries.items():
        row = f"{run.parameters:,}", f"{run.tokens:,}", f"{run.eval_perplexity:.2f}", f"{run.tokens_per_second:,.0f}"
        table.add_row(label, *row, f"{run.training_flops:.3g}")
    console.print(table)


def show_verdict(console: Console, summaries: dict[str, RunSummary], at_one: Perplexity) -> None:
    """Who won, at which cost, and what the forks have to do with it."""
    dense, bubbles = summaries["dense"], summaries["Thoughtbubbles"]
    difference = bubbles.eval_loss - dense.eval_loss
    winner = "Thoughtbubbles" if difference < 0 else "The dense model"
    console.print(
        f"{winner} is better by {abs(difference):.4f} nats per token after equally many tokens; Thoughtbubbles spent "
        f"{bubbles.training_flops / dense.training_flops:.2f} times the FLOPs. One seed: small differences may be luck."
    )
    console.print(
        f"The same Thoughtbubbles model with forking forbidden at test time (budget 1): perplexity "
        f"{at_one.perplexity:.2f}, {at_one.loss - bubbles.eval_loss:+.4f} nats. What is left of its lead then is the "
        "gates' doing, not the forks'."
    )


def show_sample(console: Console) -> None:
    """What the Thoughtbubbles model writes."""
    model, tokenizer = load_model(OUTPUT / "bubbles"), load_tokenizer(OUTPUT / "bubbles")
    console.rule("a sample of Thoughtbubbles")
    made = generate_text(model, tokenizer, PROMPT, max_new_tokens=80, sampling=Sampling(temperature=0.7))
    console.print(made.prompt + made.continuation, markup=False, highlight=False)
    console.rule()


def validation_blocks() -> torch.Tensor:
    """All validation blocks, [n, T]."""
    blocks: torch.Tensor = load_prepared(OUTPUT / "data").validation[:]["input_ids"]
    return blocks


def draw() -> None:
    """The two pictures."""
    plot_losses(
        {"dense": OUTPUT / "dense", "Thoughtbubbles, budget 2": OUTPUT / "bubbles"},
        OUTPUT / "loss.png",
        "Python's standard library, held-out files",
    )
    model, tokenizer = load_model(OUTPUT / "bubbles"), load_tokenizer(OUTPUT / "bubbles")
    ids = validation_blocks()[0, :PASSAGE_TOKENS]
    plot_bubbles(
        [str(tokenizer.decode([token])) for token in ids.tolist()],
        bubble_sizes(model, ids[None])[0].tolist(),
        model.config.gated_layers,
        OUTPUT / "bubbles.png",
        "Streams of each token of a held-out passage",
    )


if __name__ == "__main__":
    main()
