import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.inspection.bubbles import bubble_sizes
from thoughtbubbles.support import plots


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that plots write, for looking at their data."""
    figures: list[Figure] = []
    save = plots.save_figure

    def keep(figure: Figure, output: Path) -> None:
        figures.append(figure)
        save(figure, output)

    monkeypatch.setattr(plots, "save_figure", keep)
    return figures


def test_losses_are_those_of_the_metrics(tmp_path: Path, drawn: list[Figure]) -> None:
    for name, losses in (("a", [5.0, 4.0]), ("b", [6.0, 3.5, 3.0])):
        rows = [{"step": i, "tokens": 100 * i, "flops": 1, "eval_loss": loss} for i, loss in enumerate(losses, 1)]
        rows.insert(1, {"step": 1, "tokens": 100, "flops": 1, "loss": 9.0})
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends = {"dense": 4.125, "ours": 2.75}
    plots.plot_losses({"dense": tmp_path / "a", "ours": tmp_path / "b"}, tmp_path / "loss.png", ends, "A title")
    (axes,) = drawn[0].axes
    first, its_end, second, other_end, _ = axes.lines
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([100, 200], [5.0, 4.0])
    assert list(second.get_ydata()) == [6.0, 3.5, 3.0]
    # The picture ends at what is reported.
    assert [line.get_xydata().tolist() for line in (its_end, other_end)] == [[[200, 4.125]], [[300, 2.75]]]
    assert [text.get_text() for text in axes.texts] == ["4.125", "2.750"]
    labels = legend_of(drawn[0])
    assert labels[:2] == ["dense", "ours"]
    assert "as reported" in labels[2]
    check_layout(drawn[0])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "loss.png.partial").exists()


def test_scores_stand_over_their_budgets(tmp_path: Path, drawn: list[Figure]) -> None:
    lines = {"harness, acc": [(2.0, 0.5, 0.1), (1.0, 0.4, 0.05)], "authors, acc": [(1.0, 0.3, 0.0)]}
    panels = {"piqa": lines, "blimp": {"harness, acc": [(1.0, 0.6, 0.0)]}, "a": lines, "b": lines}
    plots.plot_scores(panels, tmp_path / "scores.png", "model")
    axes = drawn[0].axes
    assert [each.get_title() for each in axes[:4]] == ["piqa", "blimp", "a", "b"]
    first: Any = axes[0].containers[0]
    assert (list(first.lines[0].get_xdata()), list(first.lines[0].get_ydata())) == ([1.0, 2.0], [0.4, 0.5])
    assert [segment[:, 1].tolist() for segment in first.lines[2][0].get_segments()] == [
        pytest.approx([0.35, 0.45]),
        pytest.approx([0.4, 0.6]),
    ]
    assert legend_of(drawn[0]) == ["harness, acc", "authors, acc"]
    # One label has one colour in all panels, whatever else they show.
    reordered = {"x": {"b": lines["harness, acc"]}, "y": {"a": lines["harness, acc"], "b": lines["harness, acc"]}}
    plots.plot_scores(reordered, tmp_path / "again.png", "m" * 80)
    first, second = drawn[1].axes[:2]
    assert first.lines[0].get_color() == second.lines[3].get_color() != second.lines[0].get_color()
    for figure in drawn:
        check_layout(figure)
    assert [each.axison for each in axes[3:]] == [True, False, False]
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_scores_stand_over_whole_difficulties(tmp_path: Path, drawn: list[Figure]) -> None:
    lines = {"budget 1": [(1.0, 0.9, 0.1), (2.0, 0.4, 0.1)]}
    plots.plot_scores({"exact match": lines}, tmp_path / "scores.png", xlabel="difficulty")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "difficulty"
    assert list(axes.get_xticks()) == [1, 2]


def test_bubbles_are_drawn_token_by_token(tmp_path: Path, drawn: list[Figure]) -> None:
    tokens = [f"t{i}" for i in range(40)]
    sizes = [[1] * 40, [2] * 40, [1 + i % 3 for i in range(40)]]
    plots.plot_bubbles(tokens, sizes, [1], tmp_path / "bubbles.png")
    top, bottom = drawn[0].axes[:2]
    assert top.images[0].get_array().tolist() == [row[:20] for row in sizes]
    assert bottom.images[0].get_array().tolist() == [row[20:] for row in sizes]
    assert [label.get_text() for label in bottom.get_xticklabels()] == tokens[20:]
    assert [label.get_text() for label in top.get_yticklabels()] == ["0", "fork 1", "2"]


@pytest.mark.parametrize("count", [1, 2, 5, 31, 33, 65, 200])
def test_panels_are_filled(count: int) -> None:
    figure, panels = plots.token_panels(["t"] * count, height=2)
    assert [column for _, columns in panels for column in columns] == list(range(count))
    figure.draw_without_rendering()
    widest = max(len(columns) for _, columns in panels)
    for axes, columns in panels:
        left, right = axes.get_xlim()
        assert (left, right) == (-0.5, widest - 0.5)
        assert len(columns) >= 0.7 * widest
        assert axes.get_window_extent().width > 0.8 * figure.bbox.width


def legend_of(figure: Figure) -> list[str]:
    """The labels of a figure's only legend."""
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def check_layout(figure: Figure) -> None:
    """Nothing covers data: the legend stands outside all axes, and the title in the figure and beside the legend."""
    figure.draw_without_rendering()
    legends = [legend.get_window_extent() for legend in figure.legends]
    titles = [text.get_window_extent() for text in figure.texts if text.get_text() == figure.get_suptitle() != ""]
    for axes in figure.axes:
        assert axes.get_legend() is None
        assert not any(axes.get_window_extent().overlaps(box) for box in legends + titles)
    assert not any(title.overlaps(box) for title in titles for box in legends)
    for box in legends + titles:
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height


@pytest.mark.parametrize(
    ("token", "shown"), [("\n        ", "↵·×8"), (" the", "·the"), ("$x$", r"\$x\$"), ("a" * 20, "a" * 11 + "…")]
)
def test_tokens_show_their_white_space(token: str, shown: str) -> None:
    assert plots.visible_token(token) == shown


def test_bubble_sizes_are_those_of_the_streams(tiny_run: Path) -> None:
    model = ThoughtbubblesForCausalLM.from_pretrained(tiny_run / "model")
    ids = torch.arange(2, 12)[None]
    sizes = bubble_sizes(model, ids)
    streams = model(ids, output_streams=True).streams
    assert sizes.shape == (1, 3, 10)
    assert sizes.sum(2).tolist() == [[int(s.alive.sum()) for s in streams[:-1]]]
    assert (bubble_sizes(model, ids, budget=1) == 1).all()
