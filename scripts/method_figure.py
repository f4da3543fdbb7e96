"""Draw docs/images/method.png: the streams of a few tokens through a tiny model, from the trace of a real forward.

The weights are random, so what forks and what is deleted means nothing; how it happens is what a trained model does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve
from matplotlib.patheffects import withStroke
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from thoughtbubbles import BubbleTrace, ThoughtbubblesConfig, ThoughtbubblesForCausalLM, trace_bubbles
from thoughtbubbles.inspection.trace import Lifetime, family_order
from thoughtbubbles.support.plots import LINE_COLOURS, save_figure

OUTPUT = Path(__file__).parents[1] / "docs" / "images" / "method.png"
WORDS = ["The", "old", "man", "walked", "to", "the", "harbour"]
SEED = 27
# A new gate gives every stream nearly the same scores; these weights make it choose.
GATE_SCALE = 15.0
CROSS: dict[str, Any] = {"marker": "x", "markersize": 10, "markeredgewidth": 3, "zorder": 5}
ROOT, DELETED, GREY = "black", LINE_COLOURS[1], "#666666"
FORK_COLOURS = (LINE_COLOURS[0], LINE_COLOURS[2], LINE_COLOURS[4])
# A gate and its routing stand in the lowest part of their layer, the block above them.
GATE_HEIGHT, GAP = 0.44, 0.025
# The merge above the last block, the prediction above that, the token below the input.
MERGE, PREDICTION, TOKEN = 0.6, 0.55, -0.38
BETWEEN_TOKENS = 0.75


def main() -> None:
    """Trace and draw."""
    save_figure(draw(trace()), OUTPUT)


def trace() -> BubbleTrace:
    """What becomes of the words' streams in a small model of random weights."""
    torch.manual_seed(SEED)
    config = ThoughtbubblesConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=6, num_attention_heads=4, fork_layers=[1, 2, 4]
    )
    model = ThoughtbubblesForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.startswith("model.gates.") and name.endswith("projection.weight"):
            parameter.data *= GATE_SCALE
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    return trace_bubbles(model, PreTrainedTokenizerFast(tokenizer_object=words), range(len(WORDS)))


@dataclass(frozen=True)
class _Strand:
    """One stream as it is drawn.

    Attributes:
        life: where it begins and ends.
        x: its place.
        source_x: that of the stream that it was forked from; its own for the first of a token.
        merge_x: that of its token's root, where it is merged.
        score: p by layer.
    """

    life: Lifetime
    x: float
    source_x: float
    merge_x: float
    score: dict[int, float]


def strands(found: BubbleTrace) -> list[_Strand]:
    """All streams with their places: a fork left of its source, the root of each token rightmost."""
    places: dict[int, float] = {}
    families = [family_order(found.lifetimes(token)) for token in range(len(found.tokens))]
    x = 0.0
    for family in families:
        for life in family:
            places[life.stream] = x
            x += 1
        x += BETWEEN_TOKENS
    return [
        _Strand(
            life,
            places[life.stream],
            places[life.stream if life.source is None else life.source],
            places[family[-1].stream],
            dict(_scores(found, life.stream)),
        )
        for family in families
        for life in family
    ]


def _scores(found: BubbleTrace, stream: int) -> Iterator[tuple[int, float]]:
    table = found.streams
    for row in np.flatnonzero((table.stream == stream) & table.survives):
        yield int(table.layer[row]), float(np.exp(table.log_score[row]))


def draw(found: BubbleTrace) -> Figure:
    """The streams of every token from the input, below, to the predictions, above."""
    drawn = strands(found)
    right = max(strand.x for strand in drawn)
    figure = Figure(figsize=(11.5, 8), layout="constrained")
    axes = figure.subplots()
    _draw_layers(axes, found, right)
    for strand in drawn:
        _draw_strand(axes, strand, found)
    for strand in drawn:
        if strand.life.is_root:
            _draw_ends(axes, strand, found)
    axes.set(xlim=(-3.3, right + 4.5), ylim=(-0.6, found.num_layers + 1.75))
    axes.set_axis_off()
    axes.legend(handles=_legend(found), frameon=False, ncols=7, loc="upper center", fontsize=10, columnspacing=1.3)
    return figure


def _draw_layers(axes: Axes, found: BubbleTrace, right: float) -> None:
    sizes = found.bubble_sizes().sum(1)
    left_side: dict[str, Any] = {"x": -1.05, "ha": "right", "va": "center", "fontsize": 11}
    right_side: dict[str, Any] = {"x": right + 1.05, "va": "center", "fontsize": 11}
    for layer in range(found.num_layers):
        low = layer + (GATE_HEIGHT if layer in found.fork_layers else GAP)
        _draw_box(axes, right, low, layer + 1 - GAP, "#E4E8EC")
        middle = (low + layer + 1 - GAP) / 2
        axes.text(y=middle, s=f"block {layer}", color=GREY, **left_side)
        axes.text(y=middle, s=f"{sizes[layer]} streams", color=GREY, **right_side)
    for layer in found.fork_layers:
        colour, middle = _colour_of_layer(found, layer), layer + GATE_HEIGHT / 2
        _draw_box(axes, right, layer + GAP, layer + GATE_HEIGHT - GAP, colour)
        axes.text(y=middle, s="gate, routing", color=colour, weight="bold", **left_side)
        axes.text(y=middle, s=_changes(found, layer), color=colour, weight="bold", **right_side)
    top = found.num_layers + MERGE
    axes.text(y=top, s="merge", weight="bold", **left_side)
    axes.text(y=top, s=r"$h_t=\sum\,p\,x$", **{**right_side, "fontsize": 14})
    axes.text(y=top + PREDICTION, s="prediction", **left_side)
    axes.text(y=TOKEN, s="token", **left_side)


def _draw_box(axes: Axes, right: float, low: float, high: float, colour: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (-0.75, low),
            right + 1.5,
            high - low,
            boxstyle="round,pad=0,rounding_size=0.15",
            mutation_aspect=0.5,
            facecolor=to_rgba(colour, 0.2 if colour in LINE_COLOURS else 0.55),
            edgecolor="none",
            zorder=0,
        )
    )


def _draw_strand(axes: Axes, strand: _Strand, found: BubbleTrace) -> None:
    life, colour = strand.life, _colour(strand.life, found)
    end = found.num_layers if life.deleted_at is None else life.deleted_at
    start = life.forked_at + (0 if life.source is None else GATE_HEIGHT)
    for layer in range(life.forked_at, end):
        low, high = max(start, layer), layer + 1
        ends = [low, high + (0.02 if high < end else 0)]
        axes.plot([strand.x] * 2, ends, color=colour, linewidth=_width(strand.score[layer]), solid_capstyle="butt")
    if life.source is not None:
        leaving = (strand.source_x, life.forked_at), (strand.x, start + 0.01)
        _draw_bend(axes, *leaving, colour, _width(strand.score[life.forked_at]))
    if life.deleted_at is not None:
        cross = life.deleted_at + GATE_HEIGHT / 2
        axes.plot([strand.x] * 2, [end, cross], color=colour, linewidth=_width(strand.score[end - 1]))
        axes.plot(
            [strand.x], [cross], color=DELETED, path_effects=[withStroke(linewidth=6, foreground="white")], **CROSS
        )
    else:
        width = _width(strand.score[end - 1])
        _draw_bend(axes, (strand.x, end - 0.01), (strand.merge_x, end + MERGE), colour, width)


def _draw_bend(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float) -> None:
    """A curve that begins and ends upright."""
    middle = (start[1] + end[1]) / 2
    points = [start, (start[0], middle), (end[0], middle), end]
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
    axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=colour, linewidth=width, capstyle="butt", zorder=2))


def _draw_ends(axes: Axes, root: _Strand, found: BubbleTrace) -> None:
    """The token below its root, the merge and the prediction above it."""
    x, top = root.x, found.num_layers + MERGE
    axes.annotate(
        "", (x, top + PREDICTION - 0.07), (x, top), arrowprops={"arrowstyle": "-|>", "color": ROOT, "linewidth": 1.6}
    )
    axes.plot([x], [top], "o", markersize=12, markerfacecolor="white", color=ROOT, markeredgewidth=2, zorder=6)
    axes.plot([x, x], [-0.18, 0], color=ROOT, linewidth=_width(1.0), solid_capstyle="butt")
    word = found.tokens[root.life.token]
    axes.text(x, TOKEN, word, ha="center", va="center", fontsize=13, weight="bold")
    axes.text(x, top + PREDICTION, f"after “{word}”", ha="center", va="center", fontsize=10)


def _changes(found: BubbleTrace, layer: int) -> str:
    """How many streams a fork layer made and deleted."""
    lives = found.lifetimes()
    made = sum(life.source is not None and life.forked_at == layer for life in lives)
    gone = sum(life.deleted_at == layer for life in lives)
    return f"{made} forked" + (f", {gone} deleted" if gone else "")


def _colour(life: Lifetime, found: BubbleTrace) -> str:
    return ROOT if life.is_root else _colour_of_layer(found, life.forked_at)


def _colour_of_layer(found: BubbleTrace, layer: int) -> str:
    return FORK_COLOURS[found.fork_layers.index(layer)]


def _width(score: float) -> float:
    """Points, for a stream of cumulative score p."""
    return 1.2 + 5.5 * score


def _legend(found: BubbleTrace) -> list[Line2D]:
    forks = [
        Line2D([], [], color=_colour_of_layer(found, layer), linewidth=3, label=f"fork of layer {layer}")
        for layer in found.fork_layers
    ]
    return [
        Line2D([], [], color=ROOT, linewidth=3, label="root"),
        *forks,
        Line2D([], [], linestyle="", label="deleted", color=DELETED, **CROSS),
        Line2D([], [], color=GREY, linewidth=_width(0.9), label="p near 1"),
        Line2D([], [], color=GREY, linewidth=_width(0.02), label="p near 0"),
    ]


if __name__ == "__main__":
    main()
