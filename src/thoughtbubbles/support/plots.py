"""Plots of runs and of bubbles."""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from thoughtbubbles.support.files import replacing
from thoughtbubbles.support.metrics import read_metrics

# Okabe and Ito's colours, which the colour-blind can tell apart.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#555555"
TOKENS_PER_ROW = 32
TOKEN_WIDTH, LEAST_WIDTH = 0.36, 6.0  # inches
LETTERS_PER_INCH, LEAST_LETTERS = 12, 10
MOST_TICKS = 8


Beside = Literal["outside right center", "outside lower center", "outside lower right"]


def plot_losses(runs: Mapping[str, Path], output: Path, ends: Mapping[str, float], title: str = "") -> None:
    """Validation loss against training tokens, one line for each run's metrics.jsonl.

    Args:
        runs: label to the folder of a run.
        output: PNG to write.
        ends: label to the loss that is reported of the run, which a ring marks: it was measured when the run was done,
            on other blocks than the curve.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for (label, folder), colour in zip(runs.items(), cycle_colours(len(runs)), strict=True):
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if "eval_loss" in row]
        tokens, losses = [row["tokens"] for row in rows], [row["eval_loss"] for row in rows]
        axes.plot(tokens, losses, marker="o", markersize=3.5, linewidth=1.6, color=colour, label=label)
        end = (tokens[-1], ends[label])
        axes.plot(*end, marker="o", markersize=9, markerfacecolor="none", markeredgewidth=1.6, color=colour)
        shown = f"{end[1]:.3f}"
        axes.annotate(shown, end, xytext=(9, 0), textcoords="offset points", color=colour, va="center")
    axes.plot(
        [],
        [],
        "o",
        markersize=9,
        markerfacecolor="none",
        color=GREY,
        label="as reported: measured\nat the end, on more text",
    )
    axes.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
    axes.xaxis.set_major_formatter(FuncFormatter(axis_count))
    axes.margins(x=0.08)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    legend_outside(figure, axes)
    set_title(figure, title)
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
    colours = ListedColormap([mpl.colormaps["YlGnBu"](0.05 + 0.8 * i / max(most - 1, 1)) for i in range(most)])
    norm = BoundaryNorm([i + 0.5 for i in range(most + 1)], most)
    figure, panels = token_panels(tokens, height=1.15 + 0.27 * layers)
    for axes, columns in panels:
        part = [[layer[column] for column in columns] for layer in sizes]
        image = axes.imshow(part, cmap=colours, norm=norm, aspect="auto", origin="lower")
        _write_counts(axes, part, most)
        _fit_tokens(axes, len(panels[0][1]))
        axes.tick_params(axis="x", length=0)
        axes.set_yticks(range(layers), [f"fork {i}" if i in fork_layers else str(i) for i in range(layers)])
        axes.spines[:].set_visible(False)
        axes.set_ylabel("layer")
    every = [axes for axes, _ in panels]
    bar = figure.colorbar(image, ax=every, ticks=range(1, most + 1), pad=0.01, aspect=30 * len(panels), shrink=0.95)
    bar.set_label("streams of the token")
    set_title(figure, title)
    return figure


def token_panels(tokens: Sequence[str], height: float, sharey: bool = False) -> tuple[Figure, list[tuple[Axes, range]]]:
    """A panel for every few dozen tokens, evenly filled and as wide as they need, with the range that each shows.

    Args:
        tokens: T labels.
        height: of a panel in inches.
        sharey: whether all panels have one scale.
    """
    width = math.ceil(len(tokens) / math.ceil(len(tokens) / TOKENS_PER_ROW))
    ranges = [range(start, min(start + width, len(tokens))) for start in range(0, len(tokens), width)]
    size = (max(LEAST_WIDTH, 1.4 + TOKEN_WIDTH * width), 0.6 + height * len(ranges))
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(len(ranges), 1, squeeze=False, sharey=sharey)[:, 0])
    for axes, columns in zip(panels, ranges, strict=True):
        labels = [visible_token(tokens[column]) for column in columns]
        axes.set_xticks(range(len(columns)), labels, rotation=55, ha="right", fontsize=9)
        _fit_tokens(axes, width)
    return figure, list(zip(panels, ranges, strict=True))


def _fit_tokens(axes: Axes, width: int) -> None:
    axes.set_xlim(-0.5, width - 0.5)


def legend_outside(figure: Figure, *panels: Axes, loc: Beside = "outside right center", ncols: int = 1) -> None:
    """One legend for all panels, beside them, so that it covers no data."""
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if entries:
        figure.legend(
            list(entries.values()), list(entries), loc=loc, ncols=min(ncols, len(entries)), frameon=False, fontsize=9
        )


def set_title(figure: Figure, text: str) -> None:
    """A title in as many lines as the width of the figure makes of it."""
    for letters in range(int(LETTERS_PER_INCH * figure.get_figwidth()), LEAST_LETTERS, -5):
        title = figure.suptitle(textwrap.fill(text, letters), fontsize=11)
        if title.get_window_extent().width <= figure.bbox.width:
            return


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
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    colours = dict(zip(labels, cycle_colours(len(labels)), strict=True))
    for axes, (name, lines) in zip(places, panels.items(), strict=False):
        for label, points in lines.items():
            budgets, scores, errors = zip(*sorted(points), strict=True)
            axes.errorbar(
                budgets, scores, errors, marker="o", markersize=3.5, capsize=2, color=colours[label], label=label
            )
        axes.set(title=name, xlabel=xlabel)
        measured = sorted({point[0] for points in lines.values() for point in points})
        if len(measured) <= MOST_TICKS:
            axes.set_xticks(measured, [f"{place:g}" for place in measured])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    legend_outside(figure, *places, loc="outside lower center", ncols=columns)
    set_title(figure, title)
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


def cycle_colours(count: int) -> list[str]:
    """So many of `LINE_COLOURS`, over again where there are no more."""
    return [LINE_COLOURS[i % len(LINE_COLOURS)] for i in range(count)]


def save_figure(figure: Figure, output: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with replacing(output) as partial:
        figure.savefig(partial, dpi=150, format="png")
