"""`make demo`: train a dense and a Thoughtbubbles model on the same text and show both.

Finished parts are not done again; a run that was interrupted goes on from its last checkpoint.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from thoughtbubbles.data import load_prepared, prepare
from thoughtbubbles.evaluation.generation import Sampling, generate_text
from thoughtbubbles.evaluation.perplexity import token_losses
from thoughtbubbles.inspection.bubbles import bubble_sizes
from thoughtbubbles.model.loading import load_model, load_tokenizer
from thoughtbubbles.recipes.training import load_recipe
from thoughtbubbles.support.files import write_text
from thoughtbubbles.support.plots import plot_bubbles, plot_losses
from thoughtbubbles.support.sampling import spread
from thoughtbubbles.support.statistics import Estimate, paired_difference
from thoughtbubbles.support.text import token_pieces
from thoughtbubbles.training.folder import RunSummary
from thoughtbubbles.training.run import train

RECIPES = {"dense": Path("recipes/demo-dense.yaml"), "Thoughtbubbles": Path("recipes/demo.yaml")}
OUTPUT = Path("runs/demo")
PROMPT = "def read_file(path):\n"
PASSAGE_TOKENS = 96
MEASURED_BLOCKS = 512


@dataclass(frozen=True)
class Measured:
    """A trained model on text that it has not seen.

    Attributes:
        title: for a reader who knows nothing yet.
        parameters: of the model.
        training_flops: operations that its training took.
        losses: nats per token, block by block.
    """

    title: str
    parameters: int
    training_flops: int
    losses: npt.NDArray[np.float64]

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss."""
        return math.exp(self.losses.mean())

    def against(self, other: "Measured") -> Estimate:
        """Loss minus the other's, with a 95% interval over blocks."""
        return paired_difference(self.losses[None], other.losses[None])


def main() -> None:
    """Prepare, train, measure, compare, sample, draw."""
    start = time.monotonic()
    console = Console(width=min(Console().width, 110))
    prepare(OUTPUT / "data", vocab_size=2048, block_size=128, validation_fraction=0.03)
    summaries = {label: train(load_recipe(path)) for label, path in RECIPES.items()}
    dense, bubbles = summaries["dense"], summaries["Thoughtbubbles"]
    measured = [
        measure("dense transformer", OUTPUT / "dense", dense),
        measure("Thoughtbubbles, up to 2 streams a token", OUTPUT / "bubbles", bubbles),
        measure("the same model, forks forbidden", OUTPUT / "bubbles", bubbles, budget=1),
    ]
    show_table(console, bubbles.tokens, measured)
    show_verdict(console, *measured)
    show_sample(console)
    draw({"dense": measured[0], "Thoughtbubbles, budget 2": measured[1]})
    results = [{**asdict(each), "losses": each.losses.tolist()} for each in measured]
    write_text(OUTPUT / "results.json", json.dumps(results) + "\n")
    console.print(f"\nIn {OUTPUT}: loss.png, bubbles.png, results.json, and each run's metrics, checkpoints and model.")
    console.print(
        "Next: thoughtbubbles generate runs/demo/bubbles --prompt 'def main' --show-bubbles, and docs/guide.md."
    )
    console.print(f"Done in {(time.monotonic() - start) / 60:.1f} minutes.")


def measure(title: str, folder: Path, summary: RunSummary, budget: int | None = None) -> Measured:
    """The losses of a run's model on validation blocks, evenly spaced."""
    rows = load_prepared(OUTPUT / "data").validation
    blocks = torch.stack([rows[index]["input_ids"] for index in spread(len(rows), MEASURED_BLOCKS)])
    losses = token_losses(load_model(folder), blocks, budget=budget, batch_size=32)
    return Measured(title, summary.parameters, summary.training_flops, losses.double().mean(1).numpy())


def show_table(console: Console, tokens: int, measured: list[Measured]) -> None:
    """One row a model, in words that need no documentation."""
    dense = measured[0]
    console.print(
        f"\nTwo small language models of {dense.parameters / 1e6:.2f}M parameters each read the same {tokens:,} tokens "
        "of Python source in the same order, and were asked to predict files that neither had seen."
    )
    table = Table()
    table.add_column("")  # the one that gives way on a narrow terminal
    for column in ("perplexity:\nless is better", "loss minus\ndense's, nats", "operations\nto train"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in measured:
        cost = f"{each.training_flops / dense.training_flops:.2f} x dense"
        row = f"{each.perplexity:.1f}", "" if each is dense else interval(each.against(dense))
        table.add_row(each.title, *row, cost)
    console.print(table)


def interval(difference: Estimate) -> str:
    """A difference and the margin of its 95% interval."""
    return f"{difference.mean:+.3f} +- {difference.high - difference.mean:.3f}"


def show_verdict(console: Console, dense: Measured, bubbles: Measured, at_one: Measured) -> None:
    """Which is better, by how much more than its error, and what that does not show."""
    difference, forks = bubbles.against(dense), bubbles.against(at_one)
    margin = difference.high - difference.mean
    if difference.settled:
        better = "Thoughtbubbles" if difference.mean < 0 else "The dense model"
        console.print(
            f"{better} is better by {abs(difference.mean):.3f} nats a token, {abs(difference.mean) / margin:.0f} times "
            "the margin of error over these files."
        )
    else:
        console.print(f"Neither is better: the difference lies within the margin of error, {margin:.3f} nats a token.")
    console.print(
        f"Of that, the forks make {-forks.mean:+.3f} +- {forks.high - forks.mean:.3f}: what is left with forks "
        "forbidden comes from the gates, which also scale what each layer adds."
    )
    console.print(
        "What this does not show: one seed each, so another pair of runs may differ by more than the margin; forks "
        f"took {bubbles.training_flops / dense.training_flops:.2f} times the dense model's operations, for "
        "which that could have read more text; and leads at this size shrink with more training (docs/results.md)."
    )


def show_sample(console: Console) -> None:
    """What the Thoughtbubbles model writes."""
    model, tokenizer = load_model(OUTPUT / "bubbles"), load_tokenizer(OUTPUT / "bubbles")
    console.rule("a sample of Thoughtbubbles")
    made = generate_text(model, tokenizer, PROMPT, max_new_tokens=80, sampling=Sampling(temperature=0.7))
    console.print(made.prompt + made.continuation, markup=False, highlight=False)
    console.rule()


def draw(measured: dict[str, Measured]) -> None:
    """The two pictures; the curves end at the table's figures."""
    plot_losses(
        {"dense": OUTPUT / "dense", "Thoughtbubbles, budget 2": OUTPUT / "bubbles"},
        OUTPUT / "loss.png",
        {label: float(each.losses.mean()) for label, each in measured.items()},
        "Python's standard library, held-out files",
    )
    model, tokenizer = load_model(OUTPUT / "bubbles"), load_tokenizer(OUTPUT / "bubbles")
    ids = load_prepared(OUTPUT / "data").validation[0]["input_ids"][:PASSAGE_TOKENS]
    plot_bubbles(
        token_pieces(tokenizer, ids.tolist()),
        bubble_sizes(model, ids[None])[0].tolist(),
        model.config.gated_layers,
        OUTPUT / "bubbles.png",
        "Streams of each token of a held-out passage",
    )


if __name__ == "__main__":
    main()
