"""The tables of a comparison's report, before they are Markdown or HTML."""

import math
from collections.abc import Callable, Iterator

from thoughtbubbles.comparison.results import Report, VariantResult
from thoughtbubbles.model.budget import budget_text, parse_budget
from thoughtbubbles.model.routing import LEAK
from thoughtbubbles.support.statistics import Estimate, interval
from thoughtbubbles.support.tables import Table

Column = tuple[str, Callable[[VariantResult], str]]


def tables(report: Report) -> Iterator[Table]:
    """All tables of a report."""
    yield quality_table(report)
    yield cost_table(report)
    if report.prices:
        yield prices_table(report)
    if report.pairs:
        yield pairs_table(report)
    if (dial := dial_table(report)).rows:
        yield dial
    if any(row.exact_match for row in report.variants):
        yield exact_match_table(report)
        yield difficulty_table(report)
    if report.tuned:
        yield tuning_table(report)


def quality_table(report: Report) -> Table:
    """How well the variants predict."""
    baseline = report.find(report.baseline)
    against = report.baseline if baseline is None else baseline.title
    columns: list[Column] = [
        ("training tokens", lambda row: count(row.tokens)),
        ("seeds", lambda row: str(len(row.seeds))),
        ("perplexity", lambda row: f"{row.perplexity:.2f}{'*' if row.leaks else ''}"),
        ("prefix-only", lambda row: f"{row.prefix_perplexity:.2f}"),
        ("at test budget 1", _at_one),
        ("loss", lambda row: f"{row.loss:.4f}" + ("" if row.spread is None else f" ± {row.spread:.4f}")),
        (f"loss minus {against}'s", lambda row: "" if row.to_baseline is None else interval(row.to_baseline)),
    ]
    note = (
        f"Validation on {measured_on(report)}. Losses in nats per token, ± standard deviation over seeds; in brackets "
        f"95% intervals of the paired differences, over seeds and {report.data['unit']}; with one seed they know "
        "nothing of how much seeds differ."
    )
    if any(row.leaks for row in report.variants):
        note += f" * leaks: {LEAK}, so its prefix-only perplexity is the one to compare."
    return _by_variant("Quality", report, columns, note)


def measured_on(report: Report) -> str:
    """How many blocks or rows the losses are of, and how long these are."""
    data = report.data
    if data["unit"] == "rows":
        return f"what is to be learnt of {data['blocks']:,} held-out rows of at most {data['block_size']} tokens"
    return f"{data['blocks']} blocks of {data['block_size']} tokens"


def cost_table(report: Report) -> Table:
    """What the variants cost."""
    columns: list[Column] = [
        ("parameters", lambda row: count(row.parameters)),
        ("not embedding", lambda row: count(row.other_parameters)),
        ("learning rate", lambda row: f"{row.learning_rate:g}"),
        ("training FLOPs", lambda row: f"{row.training_flops:.3g}"),
        ("minutes", lambda row: f"{row.seconds / 60:.1f}"),
        ("tokens/s", lambda row: "" if math.isnan(row.tokens_per_second) else f"{row.tokens_per_second:,.0f}"),
        ("peak memory", lambda row: f"{row.peak_memory / 1e9:.2f} GB" if row.peak_memory else "unknown"),
        ("FLOPs per token at inference", lambda row: f"{row.decoding_flops:.3g}"),
        ("KV cache per token", lambda row: f"{row.cache_bytes / 1000:,.1f} kB"),
    ]
    note = (
        "Minutes and tokens per second are of training alone, on a machine that may have done other work beside it, "
        "and nothing where a run was too short to tell; "
        "FLOPs are counted, not measured. Inference with a cache, at the end of a block."
    )
    return _by_variant("Cost", report, columns, note)


def prices_table(report: Report) -> Table:
    """What the FLOPs of another variant buy a dense model."""
    rows = [
        [
            price.ours,
            price.theirs,
            count(price.parameters),
            count(price.tokens),
            f"{price.times_flops:.2f}",
            *(("", "") if price.difference is None else (interval(price.difference), verdict(price.difference))),
        ]
        for price in report.prices
    ]
    columns = ["variant", "against", "parameters", "training tokens", "times its FLOPs", "difference in loss", ""]
    return Table("At equal training FLOPs", columns, rows)


def pairs_table(report: Report) -> Table:
    """What a reader asks first."""
    rows = [[pair.ours, pair.theirs, interval(pair.difference), verdict(pair.difference)] for pair in report.pairs]
    return Table("Questions", ["variant", "against", "difference in loss", ""], rows)


def dial_table(report: Report) -> Table:
    """Perplexity at each test budget, of the variants that have several."""
    rows = [row for row in report.variants if len(row.at_budget) > 1]
    budgets = sorted({budget for row in rows for budget in row.at_budget}, key=parse_budget)
    cells = [
        [row.title, *(f"{row.at_budget[each].perplexity:.2f}" if each in row.at_budget else "" for each in budgets)]
        for row in rows
    ]
    note = "Perplexity, one forward a block."
    return Table("Test-time budget", ["variant", *(f"budget {budget_text(each)}" for each in budgets)], cells, note)


def exact_match_table(report: Report) -> Table:
    """How many questions the variants answer at each test budget, and how many more than the baseline."""
    asked = [(row, row.exact_match) for row in report.variants if row.exact_match is not None]
    baseline = report.find(report.baseline)
    against = report.baseline if baseline is None else baseline.title
    shares = [
        # A dense model has one stream a token, whatever budget it was given.
        {"1": found.at_budget[row.budget]} if row.routing == "none" else found.at_budget
        for row, found in asked
    ]
    budgets = sorted({budget for each in shares for budget in each}, key=parse_budget)
    rows = []
    for (row, found), at_budget in zip(asked, shares, strict=True):
        cells = [_percent(at_budget.get(each)) for each in budgets]
        if found.spread is not None:
            own = "1" if row.routing == "none" else row.budget
            cells[budgets.index(own)] += f" ± {100 * found.spread:.1f}"
        gap = found.to_baseline
        rows.append([row.title, str(len(row.seeds)), f"{row.training_flops:.3g}", *cells, points(gap) if gap else ""])
    headings = (f"budget {budget_text(each)}" for each in budgets)
    note = (
        f"Share of {asked[0][1].questions:,} questions answered letter for letter, in %, by test budget, ± standard "
        "deviation over seeds; differences in points at each one's own budget, in brackets 95% intervals over seeds "
        "and questions; with one seed they know nothing of how much seeds differ."
    )
    columns = ["variant", "seeds", "training FLOPs", *headings, f"minus {against}'s"]
    return Table("Exact match", columns, rows, note)


def difficulty_table(report: Report) -> Table:
    """The same by difficulty."""
    asked = [(row, row.exact_match) for row in report.variants if row.exact_match is not None]
    difficulties = list(asked[0][1].by_difficulty)
    rows = [[row.title, *(_percent(found.by_difficulty[each]) for each in difficulties)] for row, found in asked]
    columns = ["variant", *(f"difficulty {each}" for each in difficulties)]
    return Table("Exact match by difficulty", columns, rows, "In %, each at its own budget.")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def points(difference: Estimate) -> str:
    """A difference of shares and its interval, in points."""
    return interval(difference, scale=100, digits=1)


def tuning_table(report: Report) -> Table:
    """The learning rates that were tried."""
    rates = sorted({rate for tuned in report.tuned.values() for rate in tuned.losses})
    cells = []
    for name, tuned in report.tuned.items():
        losses = [_loss(tuned.losses.get(rate), rate == tuned.rate) for rate in rates]
        cells.append([name, *losses, "at the edge of those tried" if tuned.at_edge else ""])
    tuning = report.settings["tuning"]
    note = f"Validation loss after {tuning['tokens']:.0%} of the tokens, on other data than the comparison's, one seed."
    return Table("Learning rates", ["variant", *(f"{rate:g}" for rate in rates), ""], cells, note)


def verdict(estimate: Estimate) -> str:
    """A difference in a word."""
    if not estimate.settled:
        return "no difference shown"
    return "better" if estimate.mean < 0 else "worse"


def count(number: float) -> str:
    """A number in three digits: 1.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def _by_variant(title: str, report: Report, columns: list[Column], note: str) -> Table:
    rows = [[row.title, *(cell(row) for _, cell in columns)] for row in report.variants]
    return Table(title, ["variant", *(heading for heading, _ in columns)], rows, note)


def _at_one(row: VariantResult) -> str:
    found = row.at_budget.get("1")
    return "" if found is None or row.budget == "1" or row.routing == "none" else f"{found.perplexity:.2f}"


def _loss(loss: float | None, best: bool) -> str:
    if loss is None:
        return ""
    return "diverged" if math.isinf(loss) else f"{loss:.4f}{' (taken)' if best else ''}"
