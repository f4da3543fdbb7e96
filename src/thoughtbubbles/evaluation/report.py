"""What an evaluation came to: results.json, a table in Markdown, and the comparison with another evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

from thoughtbubbles.evaluation.benchmarks import BENCHMARKS
from thoughtbubbles.evaluation.records import EvaluationFolder, MetricRecord, TaskRecord
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.files import json_text, write_text
from thoughtbubbles.support.statistics import compare_scores
from thoughtbubbles.support.tables import markdown_table

RESULTS_NAME = "results.json"
TABLE_NAME = "table.md"
PLOT_NAME = "scores.png"
LEAK = "\\* leaks: with routing `topk`, one forward over a text sees later tokens, so this is no left-to-right score."


@dataclass(frozen=True)
class ScoreRow:
    """A score.

    Attributes:
        task, version, budget, num_fewshot: as in `TaskRecord`.
        protocol, metric, higher_is_better, leaks: as in `MetricRecord`.
        value: the metric.
        stderr: its standard error, over clusters where there are some.
        n: documents.
        clusters: how many groups of alike documents; None where each stands for itself.
    """

    task: str
    version: str
    budget: str
    num_fewshot: int
    protocol: str
    metric: str
    value: float
    stderr: float
    n: int
    clusters: int | None
    higher_is_better: bool
    leaks: bool


@dataclass(frozen=True)
class ComparisonRow:
    """A score beside another model's on the same documents.

    Attributes:
        budget, other_budget: of the two models.
        value, other_value: their scores.
        difference, low, high, p_value: as in `statistics.Difference`.
    """

    task: str
    protocol: str
    metric: str
    budget: str
    other_budget: str
    value: float
    other_value: float
    difference: float
    low: float
    high: float
    p_value: float


def rows_of(folder: EvaluationFolder) -> list[ScoreRow]:
    """The scores of all that was evaluated."""
    return [_row(record, metric) for record in folder.records(tuple(BENCHMARKS)) for metric in record.metrics]


def _row(record: TaskRecord, metric: MetricRecord) -> ScoreRow:
    scores = record.scores(metric)
    return ScoreRow(
        task=record.task,
        version=record.version,
        budget=record.budget,
        num_fewshot=record.num_fewshot,
        protocol=metric.protocol,
        metric=metric.metric,
        value=scores.estimate,
        stderr=scores.standard_error,
        n=len(record.documents),
        clusters=scores.cluster_count if record.clusters else None,
        higher_is_better=metric.higher_is_better,
        leaks=metric.leaks,
    )


def compare_folders(ours: EvaluationFolder, theirs: EvaluationFolder) -> list[ComparisonRow]:
    """Every score that both have, at the same budget; or at the other's only one, such as a dense model's.

    Raises:
        InputError: the other is no evaluation, has none of the tasks, or was evaluated on other documents.
    """
    others: dict[str, dict[str, TaskRecord]] = {}
    _ = theirs.settings
    for record in theirs.records(tuple(BENCHMARKS)):
        others.setdefault(record.task, {})[record.budget] = record
    found = []
    for record in ours.records(tuple(BENCHMARKS)):
        at = others.get(record.task, {})
        other = at.get(record.budget) or (next(iter(at.values())) if len(at) == 1 else None)
        if other is not None:
            _check_same_documents(record, other, theirs)
            found += _compare(record, other)
    if not found:
        raise InputError(f"--against {theirs.path}: expected an evaluation on some of the same tasks and budgets")
    return found


def _check_same_documents(ours: TaskRecord, theirs: TaskRecord, folder: EvaluationFolder) -> None:
    for name in ("version", "data", "num_fewshot", "documents"):
        one, other = getattr(ours, name), getattr(theirs, name)
        if one != other:
            shown = f"{len(one)} and {len(other)}" if name == "documents" else f"{one} and {other}"
            raise InputError(
                f"--against {folder.path}: {ours.task} was evaluated on other documents ({name}: {shown}), expected "
                "the same --tier, --limit, --num-fewshot and data"
            )


def _compare(ours: TaskRecord, theirs: TaskRecord) -> list[ComparisonRow]:
    found = []
    for metric in ours.metrics:
        other = theirs.find(metric.protocol, metric.metric)
        if other is None:
            continue
        one, two = ours.scores(metric), theirs.scores(other)
        difference = compare_scores(one, two)
        found.append(
            ComparisonRow(
                task=ours.task,
                protocol=metric.protocol,
                metric=metric.metric,
                budget=ours.budget,
                other_budget=theirs.budget,
                value=one.estimate,
                other_value=two.estimate,
                difference=difference.estimate,
                low=difference.low,
                high=difference.high,
                p_value=difference.p_value,
            )
        )
    return found


def write_report(folder: EvaluationFolder, against: EvaluationFolder | None = None) -> str:
    """Write results.json and table.md of all that a folder holds; the table.

    Raises:
        InputError: as `compare_folders`.
    """
    rows = rows_of(folder)
    compared = [] if against is None else compare_folders(folder, against)
    records = folder.records(tuple(BENCHMARKS))
    content = {
        **folder.settings,
        "made_with": _agreed([record.made_with for record in records]),
        "truncated": {f"{record.task}@{record.budget}": record.truncated for record in records if record.truncated},
        "results": [{**asdict(row), "stderr": None if math.isnan(row.stderr) else row.stderr} for row in rows],
        "against": None
        if against is None
        else {"model": against.settings.get("model"), "results": [asdict(row) for row in compared]},
    }
    write_text(folder.path / RESULTS_NAME, json_text(content, indent=2) + "\n")
    table = table_of(rows)
    if against is not None:
        table += f"\nAgainst {against.settings.get('model')}:\n\n{comparison_table(compared)}"
    write_text(folder.path / TABLE_NAME, table)
    return table


def _agreed(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Facts of several calls; where they differ, all values."""
    names = dict.fromkeys(name for each in facts for name in each)
    return {name: ", ".join(dict.fromkeys(each.get(name, "") for each in facts)) for name in names}


def table_of(rows: Sequence[ScoreRow]) -> str:
    """Scores with their standard errors, a column for each budget, in Markdown."""
    budgets = sorted({row.budget for row in rows}, key=Fraction)
    cells = {(row.task, row.protocol, row.metric, row.budget): row for row in rows}
    lines = []
    for task, protocol, metric in dict.fromkeys(key[:3] for key in cells):
        here = [cells.get((task, protocol, metric, budget)) for budget in budgets]
        first = next(row for row in here if row is not None)
        arrow = "↑" if first.higher_is_better else "↓"
        shots = f", {first.num_fewshot} shots" if first.num_fewshot else ""
        count = f"{first.n:,}" + (f" in {first.clusters}" if first.clusters else "")
        values = ("" if row is None else _cell(row) for row in here)
        lines.append([f"{task}{shots}", count, protocol, f"{metric} {arrow}", *values])
    columns = ["task", "n", "protocol", "metric", *(f"budget {budget}" for budget in budgets)]
    leak = f"\n{LEAK}\n" if any(row.leaks for row in rows) else ""
    return markdown_table(columns, lines, left=(0, 2, 3)) + f"\n{leak}"


def panels_of(rows: Sequence[ScoreRow]) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """For a plot of each task's headline: lines of (budget, score, standard error), of both protocols."""
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for row in rows:
        if row.metric == BENCHMARKS[row.task].headline or row.protocol == "authors":
            line = f"{row.protocol}, {row.metric}{' (leaks)' if row.leaks else ''}"
            point = (float(Fraction(row.budget)), row.value, 0.0 if math.isnan(row.stderr) else row.stderr)
            panels.setdefault(row.task, {}).setdefault(line, []).append(point)
    return panels


def _cell(row: ScoreRow) -> str:
    error = "" if math.isnan(row.stderr) else f" ± {number(row.stderr, like=row.value)}"
    return f"{number(row.value)}{error}{chr(92) + '*' if row.leaks else ''}"


def number(value: float, like: float | None = None) -> str:
    """A figure with four decimals, with two where it (or the one it belongs to) is 10 or more."""
    return f"{value:,.2f}" if abs(value if like is None else like) >= 10 else f"{value:.4f}"


def comparison_table(rows: Sequence[ComparisonRow]) -> str:
    """Differences with their 95% intervals, in Markdown."""
    lines = []
    for row in rows:
        interval = f"{row.low:+.4f} to {row.high:+.4f}"
        p_value = "< 0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}"
        budgets = f"{row.budget} / {row.other_budget}"
        scores = number(row.value), number(row.other_value), f"{row.difference:+.4f}"
        lines.append([row.task, row.protocol, row.metric, budgets, *scores, interval, p_value])
    columns = ["task", "protocol", "metric", "budgets", "this", "other", "difference", "95% interval", "p"]
    return markdown_table(columns, lines, left=(0, 1, 2, 3, 7)) + "\n"
