"""Figures of traces, of ablations and of statistics, written as PNG and SVG."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from thoughtbubbles.inspection.ablation import Ablation
from thoughtbubbles.inspection.survey import CorpusStatistics
from thoughtbubbles.inspection.trace import BubbleTrace, Lifetime, family_order
from thoughtbubbles.support.files import replacing
from thoughtbubbles.support.plots import (
    GREY,
    LINE_COLOURS,
    cycle_colours,
    draw_bubbles,
    legend_outside,
    set_title,
    token_panels,
    visible_token,
)
from thoughtbubbles.support.statistics import Curve


def save_pictures(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `name`.png and `name`.svg; returns their paths."""
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        # Without a salt and a date the same figure gives the same file.
        with replacing(path) as partial, rc_context({"svg.hashsalt": "thoughtbubbles"}):
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(partial, dpi=150, format=path.suffix[1:], metadata=metadata)
    return paths


def draw_streams(trace: BubbleTrace) -> Figure:
    """Streams of each token in each block."""
    title = f"Streams of each token in each block ({trace.setting})"
    return draw_bubbles(trace.tokens, trace.bubble_sizes().tolist(), trace.fork_layers, title)


def draw_final_scores(trace: BubbleTrace) -> Figure:
    """The cumulative score p of each stream in the last block, by token; forks by the layer that made them."""
    table = trace.streams
    last = (table.layer == trace.num_layers - 1) & table.survives
    born = {each.stream: each.forked_at for each in trace.lifetimes()}
    made_at = np.array([born[int(stream)] for stream in table.stream[last]])
    token, score, is_root = table.token[last], np.exp(table.log_score[last]), table.is_root[last]
    figure, panels = token_panels(trace.tokens, height=2.5, sharey=True)
    for axes, columns in panels:
        here = (token >= columns.start) & (token < columns.stop)
        chosen = here & is_root
        axes.scatter(token[chosen] - columns.start, score[chosen], s=26, color="black", label="root", zorder=3)
        for layer, colour in zip(trace.fork_layers, cycle_colours(len(trace.fork_layers)), strict=True):
            chosen = here & ~is_root & (made_at == layer)
            axes.scatter(
                token[chosen] - columns.start,
                score[chosen],
                s=34,
                marker="D",
                facecolor="none",
                edgecolor=colour,
                linewidth=1.3,
                label=f"forked at layer {layer}",
            )
        axes.set(ylabel="score p", yscale="log", ylim=(score.min() / 1.5, score.max() * 1.5))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    legend_outside(figure, *(axes for axes, _ in panels), loc="outside lower center", ncols=4)
    set_title(figure, f"Cumulative score p of each stream in the last block ({trace.setting})")
    return figure


def draw_tree(trace: BubbleTrace, token: int) -> Figure:
    """The family tree of one token: a line a stream through the blocks, thicker the nearer its score is to the best.

    Raises:
        ValueError: for a token that the text does not have.
    """
    family = family_order(trace.lifetimes(token))
    place = {each.stream: -i for i, each in enumerate(family)}
    score = _scores(trace, token)
    figure = Figure(figsize=(7.5, 1.7 + 0.42 * len(family)), layout="constrained")
    axes = figure.subplots()
    for each in family:
        _draw_stream(axes, each, place, score, trace.num_layers)
    for layer in trace.fork_layers:
        axes.axvline(layer, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xticks(
        range(trace.num_layers), [f"fork\n{i}" if i in trace.fork_layers else str(i) for i in range(trace.num_layers)]
    )
    axes.set_yticks(
        [place[each.stream] for each in family],
        ["root" if each.is_root else f"fork of layer {each.forked_at}" for each in family],
    )
    axes.set(xlabel="block", xlim=(-0.4, trace.num_layers + 0.6), ylim=(-len(family) + 0.4, 0.6))
    axes.spines[["top", "right"]].set_visible(False)
    deleted = "" if all(each.deleted_at is None for each in family) else "; ×: deleted"
    piece = visible_token(trace.tokens[token])
    set_title(figure, f"Streams of token {token}, “{piece}”, and their score p at the end{deleted} ({trace.setting})")
    return figure


def _draw_stream(
    axes: Axes, each: Lifetime, place: Mapping[int, int], score: Mapping[tuple[int, int], float], layers: int
) -> None:
    y = place[each.stream]
    end = layers if each.deleted_at is None else each.deleted_at
    colour = "black" if each.is_root else LINE_COLOURS[0]
    for layer in range(each.forked_at, end):
        best = max(value for (block, _), value in score.items() if block == layer)
        width = 1 + 4 * score[layer, each.stream] / best
        axes.plot([layer, layer + 1], [y, y], color=colour, linewidth=width, solid_capstyle="butt")
    if each.source is not None:
        axes.plot([each.forked_at] * 2, [y, place[each.source]], color=LINE_COLOURS[0], linewidth=1)
    if each.deleted_at is not None:
        axes.plot([end], [y], marker="x", color=LINE_COLOURS[1], markersize=9, markeredgewidth=2)
    else:
        axes.annotate(
            f"{score[layers - 1, each.stream]:.2g}", (layers, y), (6, 0), textcoords="offset points", va="center"
        )


def draw_ablation(trace: BubbleTrace, made: Ablation) -> Figure:
    """What deleting a token's forks does to its prediction, and to all later ones together: two bars a token."""
    own = dict(zip(made.tokens, (sum(change[t : t + 1]) for t, change in _pairs(made)), strict=True))
    later = dict(zip(made.tokens, (sum(change[t + 1 :]) for t, change in _pairs(made)), strict=True))
    figure, panels = token_panels(trace.tokens, height=2.5, sharey=True)
    for axes, columns in panels:
        here = [token for token in made.tokens if token in columns]
        for offset, values, label, colour in (
            (-0.2, own, "its own prediction", LINE_COLOURS[0]),
            (0.2, later, "all later ones, summed", LINE_COLOURS[4]),
        ):
            places = [token - columns.start + offset for token in here]
            axes.bar(places, [values[token] for token in here], width=0.4, color=colour, label=label)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_ylabel("nats")
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    legend_outside(figure, *(axes for axes, _ in panels), loc="outside lower center", ncols=2)
    set_title(figure, f"Growth of surprisal when a token's forks are deleted ({trace.setting})")
    return figure


def draw_uncertainty(found: CorpusStatistics) -> Figure:
    """Bubble size against entropy and surprisal, of tokens and of windows, with bands."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharey="col")
    kinds = (("entropy", found.size_by_entropy), ("surprisal", found.size_by_surprisal))
    for row, (kind, curves) in zip(panels, kinds, strict=True):
        for column, (axes, title) in enumerate(zip(row, ("each token", "windows of 4 tokens"), strict=True)):
            chosen = {name.partition(",")[0]: c for name, c in curves.items() if ("," in name) == bool(column)}
            names = {"model": "by the model itself", "reference": "by the reference model"}
            _draw_curves(axes, {names[name]: curve for name, curve in chosen.items()})
            axes.set(xlabel=f"{kind} of the next token (nats)", ylabel="bubble size (streams)", title=title)
    legend_outside(figure, *panels.flat, loc="outside lower center", ncols=2)
    _head(figure, found)
    return figure


def draw_overview(found: CorpusStatistics) -> Figure:
    """Streams by layer, place, word and piece, and what roots with forks attend to, with bands."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    (layer, position, frequency), (piece, share, each) = figure.subplots(2, 3)
    _draw_curves(layer, {"": found.streams_by_layer})
    layer.set(xlabel="block", ylabel="streams per token", title="by layer")
    _draw_curves(position, {"": found.size_by_position})
    position.set(xlabel="token of the block", ylabel="bubble size (streams)", title="by position")
    _draw_curves(frequency, {"": found.size_by_word_frequency})
    frequency.set(
        xscale="log", xlabel="occurrences in a million", ylabel="bubble size (streams)", title="by word frequency"
    )
    curve, names = found.size_by_piece, [str(name) for name in found.size_by_piece.x]
    piece.bar(names, curve.mean, color=LINE_COLOURS[0], width=0.6)
    piece.errorbar(names, curve.mean, yerr=_reach(curve), fmt="none", color="black", capsize=4)
    piece.set(ylabel="bubble size (streams)", title="by place in the word")
    own = {"itself": "self", "its forks": "forks", "their siblings": "siblings", "earlier tokens": "others"}
    # What is left to 1 falls on earlier tokens: far more than the rest.
    _draw_curves(share, {name: found.attention[kind] for name, kind in own.items() if kind != "others"})
    share.set(title="attention of a root with forks", xlabel="block", ylabel="share of attention")
    _draw_curves(each, {name: found.attention_per_stream[kind] for name, kind in own.items()})
    each.set(title="the same, per stream that it falls on", xlabel="block", ylabel="share of attention")
    for axes in (share, each):
        axes.set_ylim(bottom=0)
    # Colours tell curves apart in these two panels alone.
    legend_outside(figure, share, each, loc="outside lower right", ncols=4)
    _head(figure, found)
    return figure


def draw_effect(found: CorpusStatistics) -> Figure:
    """The mean effect of deleting a token's forks on its own prediction and on those after it, with bands.

    Raises:
        ValueError: for statistics of a model without gates, which has none to delete.
    """
    if found.ablation is None:
        raise ValueError(f"routing={found.routing!r}: expected a model with gates, whose forks can be deleted")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    _draw_curves(axes, {"": found.ablation})
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel="tokens after the one whose forks are deleted", ylabel="growth of surprisal (nats)")
    _head(figure, found)
    return figure


def _draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    for (label, curve), colour in zip(curves.items(), cycle_colours(len(curves)), strict=True):
        low, high = ([math.nan if end is None else end for end in side] for side in (curve.low, curve.high))
        axes.plot(curve.x, curve.mean, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=label)
        axes.fill_between(np.array(curve.x, dtype=float), low, high, color=colour, alpha=0.2, linewidth=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _reach(curve: Curve) -> list[list[float]]:
    """How far the band reaches below and above each mean; NaN, which is not drawn, where there is none."""
    ends = zip(curve.mean, curve.low, curve.high, strict=True)
    reach = [
        (math.nan, math.nan) if low is None or high is None else (mean - low, high - mean) for mean, low, high in ends
    ]
    return [list(side) for side in zip(*reach, strict=True)]


def _head(figure: Figure, found: CorpusStatistics) -> None:
    of = (
        f"{found.blocks:,} blocks; bands: {found.confidence:.0%} over blocks"
        if found.blocks > 1
        else "one block; no bands"
    )
    set_title(figure, f"{found.setting}; {found.tokens:,} tokens in {of}")


def _scores(trace: BubbleTrace, token: int) -> dict[tuple[int, int], float]:
    """p of a token's streams by layer and stream."""
    table = trace.streams
    mine = (table.token == token) & table.survives
    keys = zip(table.layer[mine].tolist(), table.stream[mine].tolist(), strict=True)
    return dict(zip(keys, np.exp(table.log_score[mine]).tolist(), strict=True))


def _pairs(made: Ablation) -> Iterator[tuple[int, list[float]]]:
    return zip(made.tokens, made.change, strict=True)
