"""Pictures by their data."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tests.helpers import random_ids, tiny_model
from tests.inspection.test_trace import Letters
from tests.support.test_plots import check_layout, legend_of
from thoughtbubbles import BubbleTrace, trace_bubbles
from thoughtbubbles.inspection import figures
from thoughtbubbles.inspection.ablation import Ablation, ablate
from thoughtbubbles.inspection.survey import CorpusStatistics, gather_statistics
from thoughtbubbles.inspection.trace import family_order
from thoughtbubbles.support.statistics import Curve


@pytest.fixture(scope="module")
def trace() -> BubbleTrace:
    return trace_bubbles(tiny_model(budget=2.5), Letters(), random_ids(1, 40)[0])


@pytest.fixture(scope="module")
def statistics() -> CorpusStatistics:
    dense = tiny_model(seed=3, routing="none")
    return gather_statistics(tiny_model(budget=2.5), Letters(), random_ids(12, 24), reference=dense)


def largest(trace: BubbleTrace) -> int:
    return int(trace.bubble_sizes().sum(0).argmax())


def test_streams_are_those_of_the_trace(trace: BubbleTrace) -> None:
    axes = figures.draw_streams(trace).axes[0]
    assert axes.images[0].get_array().tolist() == trace.bubble_sizes()[:, :20].tolist()


def test_scores_are_those_of_the_last_block(trace: BubbleTrace) -> None:
    figure = figures.draw_final_scores(trace)
    panels = figure.axes
    points = [tuple(point) for axes in panels for group in axes.collections for point in group.get_offsets().tolist()]
    table = trace.streams
    last = (table.layer == 3) & table.survives
    expected = zip((table.token[last] % 20).tolist(), np.exp(table.log_score[last]).tolist(), strict=True)
    np.testing.assert_allclose(sorted(points), sorted(expected))
    assert legend_of(figure) == ["root", "forked at layer 1", "forked at layer 2"]


def test_the_tree_has_a_line_a_block_and_a_cross_a_death(trace: BubbleTrace) -> None:
    token = largest(trace)
    family = trace.lifetimes(token)
    lines = figures.draw_tree(trace, token).axes[0].lines
    deaths = [line for line in lines if line.get_marker() == "x"]
    assert [int(line.get_xdata()[0]) for line in deaths] == [
        each.deleted_at for each in family_order(family) if each.deleted_at is not None
    ]
    spans = [line.get_xdata() for line in lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] not in (1.0, 2.0)]
    assert len(spans) >= trace.num_layers - 2
    blocks = sum((each.deleted_at or trace.num_layers) - each.forked_at for each in family)
    flat = [line for line in lines if len(set(line.get_ydata())) == 1 and line.get_marker() != "x"]
    assert len(flat) == blocks
    labels = [label.get_text() for label in figures.draw_tree(trace, token).axes[0].get_yticklabels()]
    assert labels[-1] == "root"
    assert len(labels) == len(family)


def test_forks_stand_left_of_their_sources(trace: BubbleTrace) -> None:
    for token in range(len(trace.tokens)):
        ordered = [each.stream for each in family_order(trace.lifetimes(token))]
        table = trace.streams
        for layer in range(trace.num_layers):
            packed = table.stream[(table.layer == layer) & table.survives & (table.token == token)].tolist()
            assert [stream for stream in ordered if stream in packed] == packed


def test_bars_are_the_changes_of_the_ablation(trace: BubbleTrace) -> None:
    made = Ablation([2, 39], [[0.0] * 2 + [0.5, -0.25, 0.125] + [0.0] * 34, [0.0] * 39])
    top, bottom = figures.draw_ablation(trace, made).axes
    assert heights(top) == [0.5, -0.125]
    assert heights(bottom) == [0, 0]


def heights(axes: Axes) -> list[float]:
    return [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]


def curve_of(axes: Axes, index: int) -> tuple[list[float], list[float]]:
    line = axes.lines[index]
    return list(line.get_xdata()), list(line.get_ydata())


def test_curves_are_those_of_the_statistics(statistics: CorpusStatistics) -> None:
    panels = figures.draw_uncertainty(statistics).axes
    drawn = [
        (panels[0], 0, statistics.size_by_entropy["model"]),
        (panels[0], 1, statistics.size_by_entropy["reference"]),
        (panels[1], 0, statistics.size_by_entropy["model, windows of 4"]),
        (panels[3], 1, statistics.size_by_surprisal["reference, windows of 4"]),
        (figures.draw_effect(statistics).axes[0], 0, statistics.ablation),
        *zip(figures.draw_overview(statistics).axes[:1], [0], [statistics.streams_by_layer], strict=True),
    ]
    for axes, index, curve in drawn:
        assert curve_of(axes, index) == (curve.x, curve.mean)
        band = {round(y, 9) for path in axes.collections[index].get_paths() for y in path.vertices[:, 1].tolist()}
        ends = {round(end, 9) for end in [*curve.low, *curve.high] if end is not None}
        assert band == ends


def test_overview_has_all_of_the_rest(statistics: CorpusStatistics) -> None:
    _, position, frequency, piece, share, each = figures.draw_overview(statistics).axes
    assert curve_of(position, 0)[1] == statistics.size_by_position.mean
    assert curve_of(frequency, 0)[1] == statistics.size_by_word_frequency.mean
    assert heights(piece) == statistics.size_by_piece.mean
    assert curve_of(share, 1)[1] == statistics.attention["forks"].mean
    assert curve_of(each, 3)[1] == statistics.attention_per_stream["others"].mean


def test_means_without_bands_are_drawn() -> None:
    found = gather_statistics(tiny_model(), Letters(), random_ids(1, 24))
    assert found.streams_by_layer.low == [None] * 4
    axes = figures.draw_overview(found).axes[0]
    assert not any(math.isnan(y) for y in curve_of(axes, 0)[1])


def test_a_dense_model_has_no_effect_to_draw() -> None:
    found = gather_statistics(tiny_model(routing="none"), Letters(), random_ids(2, 24))
    assert isinstance(found.streams_by_layer, Curve)
    figures.draw_overview(found)
    with pytest.raises(ValueError, match="routing='none': expected a model with gates"):
        figures.draw_effect(found)


def test_pictures_are_written_twice_and_the_same_each_time(tmp_path: Path, trace: BubbleTrace) -> None:
    made = ablate(tiny_model(budget=2.5), trace.ids, [largest(trace)])
    first = figures.save_pictures(figures.draw_ablation(trace, made), tmp_path, "one")
    again = figures.save_pictures(figures.draw_ablation(trace, made), tmp_path, "two")
    assert [path.name for path in first] == ["one.png", "one.svg"]
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in first[1].read_text()
    assert first[1].read_text() == again[1].read_text()


def all_of(trace: BubbleTrace, made: Ablation) -> list[Figure]:
    """The pictures of one text."""
    return [
        figures.draw_streams(trace),
        figures.draw_final_scores(trace),
        figures.draw_tree(trace, largest(trace)),
        figures.draw_ablation(trace, made),
    ]


@pytest.mark.parametrize("length", [1, 3, 33])
@pytest.mark.parametrize(
    ("rules", "setting"),
    [
        ({"routing": "causal", "budget": "3/2"}, "causal, budget 1.5"),
        ({"routing": "topk", "budget": 2}, "topk, budget 2; early tokens see later ones"),
        ({"routing": "copy", "budget": 3}, "copy, budget 3"),
        ({"routing": "none", "budget": 2}, "dense"),
    ],
    ids=lambda value: value.partition(",")[0] if isinstance(value, str) else None,
)
def test_pictures_say_what_ran_and_cover_nothing(rules: dict[str, Any], setting: str, length: int) -> None:
    found = trace_bubbles(tiny_model(**rules), Letters(), random_ids(1, length)[0])
    for figure in all_of(found, Ablation([0], [[0.5] * (length - 1)])):
        assert f"({setting})" in " ".join(figure.get_suptitle().split())
        check_layout(figure)


def test_titles_of_statistics_say_what_ran(statistics: CorpusStatistics) -> None:
    dense = gather_statistics(tiny_model(routing="none"), Letters(), random_ids(1, 24))
    for found, title in (
        (statistics, "causal, budget 2.5; 288 tokens in 12 blocks; bands: 95% over blocks"),
        (dense, "dense; 24 tokens in one block; no bands"),
    ):
        for figure in (figures.draw_uncertainty(found), figures.draw_overview(found)):
            assert " ".join(figure.get_suptitle().split()) == title
            check_layout(figure)
