"""The figures of a comparison's report."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, ScalarFormatter

from thoughtbubbles.comparison.results import Point, Report, VariantResult
from thoughtbubbles.model.budget import budget_text, parse_budget
from thoughtbubbles.model.rules import RULES
from thoughtbubbles.support.plots import LINE_COLOURS, axis_count, legend_outside, save_figure, set_title

COLOURS = (*LINE_COLOURS, "#000000", "#8B5A2B", "#7F7F7F", "#B2182B", "#7B3294", "#1B7837")
STYLES = ("-", "--", ":", "-.")
# The steep beginning of a curve hides what follows.
SHOWN_FROM = 0.25


def draw_figures(report: Report, folder: Path) -> dict[str, Path]:
    """Draw what there are data for; the paths by caption."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Path] = {}

    def draw(caption: str, name: str, drawing: Callable[[Report], Figure | None]) -> None:
        figure = drawing(report)
        if figure is not None:
            figures[caption] = folder / name
            save_figure(figure, figures[caption])

    draw("Loss against the baseline, with 95% intervals", "differences.png", differences_figure)
    draw("Validation loss against training tokens, FLOPs and time", "curves.png", curves_figure)
    draw("Loss against the FLOPs of training and of inference", "frontier.png", frontier_figure)
    draw("Perplexity against test-time budget", "dial.png", dial_figure)
    draw("Loss by training budget and test budget", "matrix.png", matrix_figure)
    draw("Part of the tokens, with a schedule of its own, against all of them", "half.png", half_figure)
    return figures


def differences_figure(report: Report) -> Figure | None:
    """Each variant's loss minus the baseline's; where it has forks, without them at test time too."""
    baseline = report.find(report.baseline)
    rows = [row for row in report.variants if row.to_baseline is not None]
    if baseline is None or not rows:
        return None
    figure, axes = _figure(7.5, 1.6 + 0.42 * len(rows))
    axes.axvline(0, color="#000000", linewidth=1)
    for place, (row, colour) in enumerate(zip(rows, colours(report, rows), strict=True)):
        estimate = row.to_baseline
        assert estimate is not None
        ends = [[max(estimate.mean - estimate.low, 0)], [max(estimate.high - estimate.mean, 0)]]
        bars = ends if np.isfinite(ends).all() else None
        axes.errorbar(estimate.mean, place, xerr=bars, fmt="o", color=colour, capsize=4, markersize=6)
        if "1" in row.at_budget and row.budget != "1":
            at_one = estimate.mean + row.at_budget["1"].to_own.mean
            axes.plot(at_one, place, marker="|", markersize=14, color=colour, linestyle="none")
    if any("1" in row.at_budget and row.budget != "1" for row in rows):
        axes.plot(
            [], [], marker="|", markersize=12, color="#444444", linestyle="none", label="the same at test budget 1"
        )
        legend_outside(figure, axes, loc="outside lower right")
    names = [f"{row.title}{' (leaks)' if row.leaks else ''}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set(xlabel=f"loss minus that of {baseline.title} (nats per token), 95% interval")
    set_title(figure, report.title)
    return figure


def curves_figure(report: Report) -> Figure | None:
    """Validation loss against tokens, FLOPs and time, the seeds' range shaded."""
    measures: dict[str, Callable[[Point], float]] = {
        "training tokens": lambda point: point.tokens,
        "training FLOPs": lambda point: point.flops,
        "minutes of training": lambda point: point.seconds / 60,
    }
    if not any(report.curves.values()):
        return None
    figure = Figure(figsize=(14, 5), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True)
    for axes, (label, measure) in zip(panels, measures.items(), strict=True):
        for row, colour, style in zip(report.variants, colours(report, report.variants), cycle(STYLES), strict=False):
            shown = [point for point in report.curves[row.name] if point.tokens >= SHOWN_FROM * _tokens(report)]
            _curve(axes, shown, measure, colour, style, row.title)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(FuncFormatter(axis_count) if label == "training tokens" else ScalarFormatter())
        _tidy(axes)
    panels[0].set_ylabel("validation loss (nats per token)")
    legend_outside(figure, *panels)
    _say_when(figure, report)
    set_title(figure, report.title)
    return figure


def frontier_figure(report: Report) -> Figure | None:
    """Each variant's final loss against what its training took and against what a token takes at inference."""
    measures: dict[str, Callable[[VariantResult], float]] = {
        "training FLOPs": lambda row: row.training_flops,
        "FLOPs per token at inference": lambda row: row.decoding_flops,
    }
    if len(report.variants) < 2:
        return None
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True)
    for axes, (label, measure) in zip(panels, measures.items(), strict=True):
        for row, colour in zip(report.variants, colours(report, report.variants), strict=True):
            axes.errorbar(measure(row), row.loss, yerr=row.spread, fmt="o", color=colour, capsize=4, label=row.title)
        axes.set_xlabel(label)
        _tidy(axes)
    panels[0].set_ylabel("validation loss (nats per token)")
    legend_outside(figure, *panels)
    spread = "means and standard deviations over seeds" if len(report.seeds) > 1 else "one seed"
    set_title(figure, f"{report.title}: {spread}".lstrip(": "))
    return figure


def dial_figure(report: Report) -> Figure | None:
    """Perplexity at each test budget of what was trained on as many tokens as the baseline, the own budget marked."""
    rows = [row for row in _whole(report) if len(row.at_budget) > 1 and RULES[row.routing].copied_at is None]
    if not rows:
        return None
    figure, axes = _figure(10, 4.8)
    for row, colour in zip(rows, colours(report, rows), strict=True):
        budgets = sorted(row.at_budget, key=parse_budget)
        values = [row.at_budget[each].perplexity for each in budgets]
        numbers = [float(parse_budget(each)) for each in budgets]
        axes.plot(numbers, values, marker="o", markersize=3.5, color=colour, label=row.title)
        own = row.at_budget[row.budget].perplexity
        axes.plot(float(parse_budget(row.budget)), own, marker="o", markersize=9, markerfacecolor="none", color=colour)
    baseline = report.find(report.baseline)
    if baseline is not None:
        axes.axhline(baseline.perplexity, color="#000000", linewidth=1, linestyle="--", label=baseline.title)
    axes.set(xlabel="test-time budget, streams per token (the trained one circled)", ylabel="perplexity")
    legend_outside(figure, axes)
    set_title(figure, report.title)
    return figure


def matrix_figure(report: Report) -> Figure | None:
    """Loss of variants with learned forks, trained on as many tokens, by training budget and test budget."""
    rows = [row for row in _whole(report) if RULES[row.routing].learned and len(row.at_budget) > 1]
    if len(rows) < 2:
        return None
    budgets = sorted({each for row in rows for each in row.at_budget}, key=parse_budget)
    losses = np.array([[_loss_at(row, budget) for budget in budgets] for row in rows])
    figure = Figure(figsize=(3.6 + 0.95 * len(budgets), 1.6 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(losses, cmap="viridis_r", aspect="auto")
    middle = (np.nanmin(losses) + np.nanmax(losses)) / 2
    for (y, x), loss in np.ndenumerate(losses):
        if np.isfinite(loss):
            colour = "black" if loss <= middle else "white"
            axes.text(x, y, f"{loss:.4f}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(budgets)), [budget_text(each) for each in budgets])
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.set(xlabel="test budget")
    set_title(figure, report.title)
    figure.colorbar(image, label="loss (nats per token)")
    return figure


def half_figure(report: Report) -> Figure | None:
    """Curves of what was trained on part of the tokens, against the ends of what was trained on all."""
    whole = _tokens(report)
    parts = [row for row in report.variants if row.tokens < 0.99 * whole]
    full = [row for row in _whole(report) if row.routing in ("none", "copy")]
    if not parts or not full:
        return None
    figure, axes = _figure(10, 4.8)
    for row in [*parts, *full]:
        (colour,) = colours(report, [row])
        style = "-" if row in parts else "--"
        shown = [point for point in report.curves[row.name] if point.tokens >= SHOWN_FROM * row.tokens]
        _curve(axes, shown, lambda point: point.tokens, colour, style, row.title)
    axes.xaxis.set_major_formatter(FuncFormatter(axis_count))
    axes.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
    legend_outside(figure, axes)
    _say_when(figure, report)
    set_title(figure, report.title)
    return figure


def colours(report: Report, rows: Sequence[VariantResult]) -> list[str]:
    """The colour of each variant, the same in every figure."""
    table: Mapping[str, str] = dict(zip((row.name for row in report.variants), cycle(COLOURS), strict=False))
    return [table[row.name] for row in rows]


def _tokens(report: Report) -> int:
    """Training tokens of the baseline, or of whoever saw most."""
    baseline = report.find(report.baseline)
    return baseline.tokens if baseline is not None else max(row.tokens for row in report.variants)


def _whole(report: Report) -> list[VariantResult]:
    """What was trained on as many tokens as the baseline."""
    return [row for row in report.variants if row.tokens == _tokens(report)]


def _curve(
    axes: Axes, points: Sequence[Point], measure: Callable[[Point], float], colour: str, style: str, label: str
) -> None:
    x = [measure(point) for point in points]
    axes.plot(x, [point.loss for point in points], color=colour, linestyle=style, linewidth=1.6, label=label)
    axes.fill_between(
        x, [point.low for point in points], [point.high for point in points], color=colour, alpha=0.15, linewidth=0
    )


def _loss_at(row: VariantResult, budget: str) -> float:
    found = row.at_budget.get(budget)
    return np.nan if found is None else found.loss


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _tidy(axes)
    return figure, axes


def _say_when(figure: Figure, report: Report) -> None:
    """Why curves do not end at the losses of the tables."""
    blocks = f"{report.data['blocks']:,} {report.data['unit']}"
    figure.supxlabel(
        f"measured while training; the losses of the tables are measured afterwards, on {blocks}", fontsize=9
    )


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_minor_formatter(NullFormatter())
