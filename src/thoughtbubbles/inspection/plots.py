"""Plots of runs and of bubbles."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from thoughtbubbles.files import replacing
from thoughtbubbles.training.callbacks import read_metrics

# Okabe and Ito's colours, which the colour-blind can tell apart.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
TOKENS_PER_ROW = 32


def plot_losses(runs: Mapping[str, Path], output: Path, title: str = "") -> None:
    """Validation loss against training tokens, one line for each run's metrics.jsonl.

    Args:
        runs: label to the folder of a run.
        output: PNG to write.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (label, folder), colour in zip(runs.items(), _cycle(LINE_COLOURS, len(runs)), strict=True):
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if "eval_loss" in row]
        tokens, losses = [row["tokens"] for row in rows], [row["eval_loss"] for row in rows]
        axes.plot(tokens, losses, marker="o", markersize=3.5, linewidth=1.6, color=colour, label=label)
        axes.annotate(
            f"{losses[-1]:.3f}",
            (tokens[-1], losses[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
        )
    axes.set(xlabel="training tokens", ylabel="validation loss (nats per token)", title=title)
    axes.xaxis.set_major_formatter(FuncFormatter(axis_count))
    axes.margins(x=0.08)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, output)


def plot_bubbles(
    tokens: Sequence[str], sizes: Sequence[Sequence[int]], fork_layers: Sequence[int], output: Path, title: str = ""
) -> None:
    """Write `draw_bubbles` as PNG to `output`."""
    save_figure(draw_bubbles(tokens, sizes, fork_layers, title), output)


def draw_bubbles(
    tokens: Sequence[str], sizes: Sequence[Sequence[int]], fork_layers: Sequence[int], title: str = ""
) -> Figure:
    """The number of streams of each token at each layer, tokens in reading order, a few dozen a row.

    Args:
        tokens: T labels.
        sizes: [L, T] streams of each token in each block.
        fork_layers: marked on the layer axis.
    """
    layers, most = len(sizes), max(max(row) for row in sizes)
    rows = math.ceil(len(tokens) / TOKENS_PER_ROW)
    colours = ListedColormap([mpl.colormaps["YlGnBu"](0.05 + 0.8 * i / max(most - 1, 1)) for i in range(most)])
    norm = BoundaryNorm([i + 0.5 for i in range(most + 1)], most)
    figure = Figure(figsize=(13, 0.6 + rows * (1.15 + 0.27 * layers)), layout="constrained")
    panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for row, axes in enumerate(panels):
        columns = range(row * TOKENS_PER_ROW, min((row + 1) * TOKENS_PER_ROW, len(tokens)))
        part = [[layer[column] for column in columns] for layer in sizes]
        image = axes.imshow(part, cmap=colours, norm=norm, aspect="auto", origin="lower")
        _write_counts(axes, part, most)
        axes.set_xticks(range(len(columns)), [visible_token(tokens[c]) for c in columns], rotation=55, ha="right")
        axes.tick_params(axis="x", labelsize=9, length=0)
        axes.set_yticks(range(layers), [f"fork {i}" if i in fork_layers else str(i) for i in range(layers)])
        axes.set_xlim(-0.5, TOKENS_PER_ROW - 0.5)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("layer")
    bar = figure.colorbar(image, ax=list(panels), ticks=range(1, most + 1), pad=0.01, fraction=0.02)
    bar.set_label("streams of the token")
    figure.suptitle(title)
    return figure


def plot_scores(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]],
    output: Path,
    title: str = "",
    xlabel: str = "budget (streams per token)",
) -> None:
    """Scores against budget, or something else, with bars of one standard error, a panel for each task.

    Args:
        panels: name of a panel to the lines in it; a line is its label and points (budget, score, standard error).
        output: PNG to write.
        xlabel: what stands in the place of the budget.
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 0.5 + 3 * rows), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, lines) in zip(places, panels.items(), strict=False):
        for (label, points), colour in zip(lines.items(), _cycle(LINE_COLOURS, len(lines)), strict=True):
            budgets, scores, errors = zip(*sorted(points), strict=True)
            axes.errorbar(budgets, scores, errors, marker="o", markersize=3.5, capsize=2, color=colour, label=label)
        axes.set(title=name, xlabel=xlabel)
        if all(float(point[0]).is_integer() for points in lines.values() for point in points):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title)
    save_figure(figure, output)


def _write_counts(axes: Axes, part: Sequence[Sequence[int]], most: int) -> None:
    for y, row in enumerate(part):
        for x, count in enumerate(row):
            colour = "white" if count > 0.6 * most and most > 1 else "#444444"
            axes.text(x, y, str(count), ha="center", va="center", fontsize=7.5, color=colour)


def visible_token(token: str) -> str:
    """A token with its white space shown, short enough for an axis."""
    shown = re.sub(" {3,}", lambda run: f"·×{len(run[0])}", token)
    shown = shown.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·").replace("$", r"\$")
    return shown if len(shown) <= 12 else f"{shown[:11]}…"


def axis_count(value: float, _: object = None) -> str:
    """A number on an axis: 1.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]


def save_figure(figure: Figure, output: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with replacing(output) as partial:
        figure.savefig(partial, dpi=150, format="png")
