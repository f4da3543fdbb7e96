import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.test_plots import check_layout
from thoughtbubbles.comparison.compare import Tuned, look
from thoughtbubbles.comparison.figures import (
    colours,
    curves_figure,
    dial_figure,
    differences_figure,
    draw_figures,
    frontier_figure,
    half_figure,
    matrix_figure,
)
from thoughtbubbles.comparison.measuring import Measurements, validation_lots
from thoughtbubbles.comparison.pages import markdown, page, write_report
from thoughtbubbles.comparison.results import Report, build_report
from thoughtbubbles.comparison.runs import RunPlanner
from thoughtbubbles.comparison.tables import cost_table, dial_table, quality_table, tuning_table, verdict
from thoughtbubbles.evaluation.perplexity import evaluate_perplexity, token_losses
from thoughtbubbles.model.accounting import cache_bytes, decoding_flops, training_flops
from thoughtbubbles.model.loading import load_model
from thoughtbubbles.support.statistics import Estimate, interval


@pytest.fixture(scope="module")
def report(finished: RunPlanner) -> Report:
    return build_report(finished, look(finished))


def test_losses_are_those_of_the_saved_models(finished: RunPlanner, report: Report) -> None:
    row = report.find("causal")
    (lot,) = validation_lots(finished.data, 5)
    blocks = lot.rows
    assert blocks.shape[0] == 5
    folder = finished.comparison.output / "runs" / "causal"
    losses = [evaluate_perplexity(load_model(folder / f"seed-{seed}"), blocks).loss for seed in (0, 1)]
    assert row.losses == pytest.approx(losses, abs=1e-5)
    assert row.loss == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert row.perplexity == pytest.approx(math.exp(row.loss))
    at_one = evaluate_perplexity(load_model(folder / "seed-0"), blocks, budget=1).loss
    measured = Measurements.read(folder / "seed-0")
    assert np.mean(measured.losses["1"]) == pytest.approx(at_one, abs=1e-5)
    assert set(measured.losses) == {"1", "3/2", "2", "3"}


def test_every_trained_model_is_measured_at_budget_1(finished: RunPlanner) -> None:
    for path in finished.comparison.output.glob("runs/*/*/measurements.json"):
        measured = Measurements.read(path.parent)
        assert "1" in measured.losses or path.parent.parent.name == "dense"


def test_differences_are_paired_by_seed_and_block(finished: RunPlanner, report: Report) -> None:
    of = {
        name: np.array(
            [
                Measurements.read(finished.comparison.output / "runs" / name / f"seed-{seed}").losses["2"]
                for seed in (0, 1)
            ]
        )
        for name in ("dense", "causal")
    }
    found = report.find("causal").to_baseline
    assert found.mean == pytest.approx((of["causal"] - of["dense"]).mean())
    assert (found.seeds, found.blocks) == (2, 5)
    assert report.find("dense").to_baseline is None
    assert report.find("causal-half").to_baseline.seeds == 1


def test_prefix_differences_vanish_unless_routing_leaks(finished: RunPlanner, report: Report) -> None:
    for name in ("dense", "budget-1", "copy-root", "causal"):
        assert report.find(name).prefix.mean == pytest.approx(0, abs=1e-5)
    folder = finished.comparison.output / "runs" / "topk" / "seed-0"
    (lot,) = validation_lots(finished.data, 3)
    blocks = lot.rows
    model = load_model(folder)
    modes = [token_losses(model, blocks, mode, positions=[4, 12]) for mode in ("prefix", "blockwise")]
    expected = (modes[0] - modes[1]).mean(1)
    assert Measurements.read(folder).prefix == pytest.approx(expected.tolist(), abs=1e-5)


def test_costs_are_those_of_accounting(finished: RunPlanner, report: Report) -> None:
    run = next(run for run in finished.runs({}) if run.variant == "causal")
    row = report.find("causal")
    assert row.training_flops == 12 * 4 * training_flops(run.config, 16)
    assert row.decoding_flops == decoding_flops(run.config, 16)
    assert row.cache_bytes == cache_bytes(run.config, 16) / 16
    assert row.tokens == 12 * 4 * 16
    assert row.seconds == pytest.approx(row.tokens / row.tokens_per_second)
    assert row.peak_memory > 0


def test_what_is_missing_is_said(report: Report) -> None:
    assert report.missing == ["causal-half/seed-1"]
    assert "Not finished: causal-half/seed-1." in markdown(report, {})


def test_questions_ask_of_forks_and_of_half_the_tokens(report: Report) -> None:
    asked = {(pair.ours, pair.theirs) for pair in report.pairs}
    causal, half = "causal, budget 2", "causal, budget 2, half the tokens"
    assert {(causal, "budget 1: gates, no forks"), (causal, "the same models at test budget 1")} <= asked
    assert {(half, "dense"), (half, "Copy-2, root")} <= asked
    turned = next(p for p in report.pairs if p.ours == causal and "test budget" in p.theirs).difference
    to_own = report.find("causal").at_budget["1"].to_own
    assert (turned.mean, turned.low, turned.high) == (-to_own.mean, -to_own.high, -to_own.low)


def test_tables_name_the_leak_and_the_budgets(report: Report) -> None:
    quality = quality_table(report)
    topk = next(row for row in quality.rows if row[0].startswith("topk"))
    assert topk[3].endswith("*")
    assert "* leaks" in quality.note
    assert dial_table(report).columns == ["variant", "budget 1", "budget 1.5", "budget 2", "budget 3"]
    assert all(len(row) == len(quality.columns) for row in quality.rows)


def test_a_rate_at_the_edge_of_those_tried_is_marked(report: Report) -> None:
    tuned = {
        "dense": Tuned({1e-3: 3.0, 2e-3: 2.0, 4e-3: math.inf}, 2e-3),
        "causal": Tuned({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0}, 1e-3),
    }
    settings = {**report.settings, "tuning": {"tokens": 0.25}}
    table = tuning_table(Report(**{**vars(report), "tuned": tuned, "settings": settings}))
    assert table.rows[0] == ["dense", "3.0000", "2.0000 (taken)", "diverged", ""]
    assert table.rows[1][-1] == "at the edge of those tried"
    assert "25%" in table.note


def test_words_of_a_difference() -> None:
    assert verdict(Estimate(-0.1, -0.2, -0.05, 3, 9)) == "better"
    assert verdict(Estimate(0.1, 0.05, 0.2, 3, 9)) == "worse"
    assert verdict(Estimate(0.1, -0.05, 0.2, 3, 9)) == "no difference shown"
    assert interval(Estimate(0.1, -math.inf, math.inf, 1, 1)) == "+0.1000"


def test_files_of_a_report(tmp_path: Path, report: Report) -> None:
    write_report(report, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in content["variants"]] == [row.name for row in report.variants]
    assert content["variants"][-1]["spread"] is None
    assert [table["title"] for table in content["tables"]] == ["Quality", "Cost", "Questions", "Test-time budget"]
    html = (tmp_path / "report.html").read_text()
    pictures = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert pictures == ["curves.png", "dial.png", "differences.png", "frontier.png", "half.png", "matrix.png"]
    text, embedded = re.subn("data:image/png;base64,[0-9A-Za-z+/=]+", "", html)
    assert embedded == len(pictures)
    assert "http" not in text.replace("http-equiv", "")
    for name in pictures:
        assert f"plots/{name}" in (tmp_path / "report.md").read_text()
        with Image.open(tmp_path / "plots" / name) as image:
            assert image.width > 500


def test_figures_cover_nothing_and_say_where_curves_end(report: Report) -> None:
    named = Report(**{**vars(report), "title": "Variants of a small model on the source text of a standard library"})
    for draw in (differences_figure, curves_figure, frontier_figure, dial_figure, matrix_figure, half_figure):
        figure = draw(named)
        check_layout(figure)
        assert named.title in " ".join(figure.get_suptitle().split())
        says = "the losses of the tables are measured afterwards, on 5 blocks" in figure.get_supxlabel()
        assert says == (draw in (curves_figure, half_figure))


def test_a_run_too_short_to_tell_has_no_speed(report: Report) -> None:
    short = replace(report.variants[0], tokens_per_second=math.nan)
    table = cost_table(Report(**{**vars(report), "variants": [short]}))
    assert dict(zip(table.columns, table.rows[0], strict=True))["tokens/s"] == ""
    assert "nan" not in table.markdown()


def test_text_in_a_page_is_escaped(report: Report) -> None:
    made = page(Report(**{**vars(report), "title": "<b> & co"}), {})
    assert "<b>" not in made
    assert "&lt;b&gt; &amp; co" in made


def test_a_variant_keeps_its_colour(tmp_path: Path, report: Report) -> None:
    assert len(set(colours(report, report.variants))) == len(report.variants)
    assert colours(report, report.variants[2:3]) == colours(report, report.variants)[2:3]
    alone = Report(**{**vars(report), "variants": report.variants[:1]})
    assert "Loss against the baseline, with 95% intervals" not in draw_figures(alone, tmp_path)
