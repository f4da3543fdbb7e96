"""What the finished runs of a comparison came to: report.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from thoughtbubbles.comparison.compare import Progress, Tuned
from thoughtbubbles.comparison.control import Trial, is_dense, kind_of, rate_caveat
from thoughtbubbles.comparison.measuring import Measurements, validation_lots
from thoughtbubbles.comparison.questions import ExactMatchResult, exact_match_of
from thoughtbubbles.comparison.runs import Run, RunPlanner
from thoughtbubbles.model.accounting import cache_bytes, decoding_flops, parameter_counts
from thoughtbubbles.model.budget import budget_text
from thoughtbubbles.model.rules import RULES
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.support.statistics import Estimate, estimate, paired_difference, spread_of
from thoughtbubbles.training.folder import METRICS_NAME, RunSummary, read_facts

__all__ = ["build_report"]


@dataclass(frozen=True)
class AtBudget:
    """The models of a variant at one test budget.

    Attributes:
        loss: nats per token, mean over seeds, one forward a block.
        spread: standard deviation over seeds; None for one seed.
        perplexity: exp of the loss.
        to_own: paired difference to the same models at their own budget.
    """

    loss: float
    spread: float | None
    perplexity: float
    to_own: Estimate


@dataclass(frozen=True)
class VariantResult:
    """A variant's row.

    Attributes:
        name: of the variant.
        title: for people.
        routing: of the model.
        budget: of the model, as text.
        training_budgets: drawn from in training, if any, as text.
        seeds: of its finished runs.
        learning_rate: that it was trained at.
        parameters: of the model.
        other_parameters: without the embedding.
        tokens: of training.
        training_flops: of training, mean over seeds.
        seconds: of training, evaluations and checkpoints left out, mean over seeds.
        tokens_per_second: of training.
        peak_memory: bytes, the largest of its runs; of the process, or on a GPU of tensors.
        loss: nats per token at its own budget, mean over seeds, one forward a block.
        losses: of each seed.
        spread: standard deviation over seeds; None for one seed.
        perplexity: exp of the loss.
        leaks: whether these losses saw later tokens (routing topk).
        prefix: prefix-only loss minus blockwise loss of the same predictions.
        prefix_perplexity: exp of the loss plus that difference.
        to_baseline: paired difference to the baseline; None for the baseline itself, or if no seed is common.
        at_budget: by test budget.
        decoding_flops: of a token at the end of a block, with a cache.
        cache_bytes: per token of such a context.
        exact_match: what its models answered; None where the recipe names no questions.
    """

    name: str
    title: str
    routing: str
    budget: str
    training_budgets: list[str] | None
    seeds: list[int]
    learning_rate: float
    parameters: int
    other_parameters: int
    tokens: int
    training_flops: float
    seconds: float
    tokens_per_second: float
    peak_memory: int
    loss: float
    losses: list[float]
    spread: float | None
    perplexity: float
    leaks: bool
    prefix: Estimate
    prefix_perplexity: float
    to_baseline: Estimate | None
    at_budget: dict[str, AtBudget]
    decoding_flops: float
    cache_bytes: float
    exact_match: ExactMatchResult | None


@dataclass(frozen=True)
class PairResult:
    """A question that two variants answer.

    Attributes:
        ours: title of one variant.
        theirs: of the other, or of the same at another budget.
        difference: ours minus theirs, paired by seed and block.
    """

    ours: str
    theirs: str
    difference: Estimate


@dataclass(frozen=True)
class Price:
    """A variant that spends the training FLOPs of another one.

    Attributes:
        ours: its title.
        theirs: that of the other one.
        parameters: of its model.
        tokens: of its training.
        times_flops: its training FLOPs, as a share of the other's.
        difference: its loss minus the other's; None if they have no seed in common.
    """

    ours: str
    theirs: str
    parameters: int
    tokens: int
    times_flops: float
    difference: Estimate | None


@dataclass(frozen=True)
class Point:
    """Validation on the way: means over the seeds that got there.

    Attributes:
        tokens: of training so far.
        flops: of training so far.
        seconds: of training so far.
        loss: nats per token.
        low: of the seeds' losses.
        high: of the seeds' losses.
    """

    tokens: float
    flops: float
    seconds: float
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """The results of a comparison, as far as it is; report.json.

    Attributes:
        title: of the comparison.
        baseline: its variant's name.
        seeds: that were asked for.
        missing: labels of runs that are not finished.
        failed: labels of runs that cannot go on, and why.
        tuned: losses of the rates tried and the best of them, by variant.
        variants: the rows.
        trials: whether extra computation pays at all.
        prices: what the FLOPs of a variant buy another one.
        pairs: differences that answer what a reader asks first.
        curves: by variant.
        settings: what it was made from: the sections of the recipe.
        data: source, tokens of the longest block or row, how many were measured, and what they are called.
        machines: on which the runs were made, each once.
    """

    title: str
    baseline: str
    seeds: list[int]
    missing: list[str]
    failed: dict[str, str]
    tuned: dict[str, Tuned]
    variants: list[VariantResult]
    trials: list[Trial]
    prices: list[Price]
    pairs: list[PairResult]
    curves: dict[str, list[Point]]
    settings: dict[str, Any]
    data: dict[str, Any]
    machines: list[dict[str, str]]

    def find(self, name: str) -> VariantResult | None:
        """A variant's row by its name; None if none of its runs is finished."""
        return next((row for row in self.variants if row.name == name), None)


Losses = dict[str, dict[int, Measurements]]


def build_report(planner: RunPlanner, progress: Progress) -> Report:
    """Gather what the finished runs came to."""
    comparison = planner.comparison
    found: Losses = {}
    runs: dict[str, list[Run]] = {}
    for run in progress.finished:
        measured = Measurements.read(run.folder)
        assert measured is not None
        found.setdefault(run.variant, {})[run.seed] = measured
        runs.setdefault(run.variant, []).append(run)
    ordered = [name for name in comparison.variants if name in runs]
    baseline = comparison.settings.baseline
    rows = [_row(planner, runs[name], found, baseline) for name in ordered]
    tuning = comparison.tuning
    return Report(
        title=comparison.settings.title or comparison.output.name,
        baseline=baseline,
        seeds=comparison.settings.seeds,
        missing=[run.label for run in progress.missing],
        failed=progress.failed,
        tuned=progress.tuned,
        variants=rows,
        trials=_trials(planner, runs, found, progress.tuned),
        prices=_prices(planner, rows, found),
        pairs=_pairs(planner, rows, found),
        curves={name: _curve(runs[name]) for name in ordered},
        settings={
            **comparison.base,
            "evaluation": asdict(comparison.evaluation),
            "tuning": None if tuning is None else asdict(tuning),
        },
        data={
            "source": ", ".join(Path(part).name for part in planner.data.source.split(", ")),
            "block_size": planner.data.longest,
            "blocks": sum(len(lot.places) for lot in validation_lots(planner.data, comparison.evaluation.blocks)),
            "unit": "rows" if comparison.base["task"] == "sft" else "blocks",
        },
        machines=_machines(progress.finished),
    )


def _machines(runs: Sequence[Run]) -> list[dict[str, str]]:
    """What the runs were made on, each kind once."""
    kinds = []
    for run in runs:
        facts = read_facts(run.folder)
        del facts["data"]
        if facts not in kinds:
            kinds.append(facts)
    return kinds


def _row(planner: RunPlanner, runs: Sequence[Run], found: Losses, baseline: str) -> VariantResult:
    first = runs[0]
    name, config = first.variant, first.config
    summaries = [RunSummary.read(run.folder) for run in runs]
    measured = [found[name][run.seed] for run in runs]
    own = str(config.exact_budget())
    losses = [fmean(each.losses[own]) for each in measured]
    loss, counts = fmean(losses), parameter_counts(config)
    prefix = estimate(np.asarray([each.prefix for each in measured]))
    rate = fmean(_rate(run.folder) for run in runs)
    budgets = first.recipe.training.training_budgets
    length = planner.data.longest
    return VariantResult(
        name=name,
        title=planner.comparison.variants[name].title.format(budget=budget_text(own)),
        routing=config.routing,
        budget=own,
        training_budgets=None if budgets is None else [str(each) for each in budgets],
        seeds=[run.seed for run in runs],
        learning_rate=first.recipe.training.learning_rate,
        parameters=counts.total,
        other_parameters=counts.total - counts.embedding,
        tokens=summaries[0].tokens,
        training_flops=fmean(each.training_flops for each in summaries),
        seconds=summaries[0].tokens / rate,
        tokens_per_second=rate,
        peak_memory=max(_peak_memory(run.folder) for run in runs),
        loss=loss,
        losses=losses,
        spread=spread_of(losses),
        perplexity=math.exp(loss),
        leaks=config.leaks,
        prefix=prefix,
        prefix_perplexity=math.exp(loss + prefix.mean),
        to_baseline=None if name == baseline else difference(found, name, baseline),
        at_budget=_at_budgets(measured, own),
        decoding_flops=decoding_flops(config, length),
        cache_bytes=cache_bytes(config, length) / length,
        exact_match=exact_match_of(found, name, baseline),
    )


def _at_budgets(measured: Sequence[Measurements], own: str) -> dict[str, AtBudget]:
    rows = {}
    for budget in measured[0].losses:
        losses = [fmean(each.losses[budget]) for each in measured]
        rows[budget] = AtBudget(
            loss=fmean(losses),
            spread=spread_of(losses),
            perplexity=math.exp(fmean(losses)),
            to_own=paired_difference(
                [each.losses[budget] for each in measured], [each.losses[own] for each in measured]
            ),
        )
    return rows


def difference(found: Losses, ours: str, theirs: str) -> Estimate | None:
    """Paired difference of two variants at their own budgets, over the seeds that both have; None if there are none."""
    common = sorted(set(found.get(ours, {})) & set(found.get(theirs, {})))
    if not common:
        return None
    a, b = ([found[name][seed].losses[found[name][seed].own] for seed in common] for name in (ours, theirs))
    return paired_difference(a, b)


def _trials(
    planner: RunPlanner, runs: Mapping[str, Sequence[Run]], found: Losses, tuned: Mapping[str, Tuned]
) -> list[Trial]:
    """What has more computation than the dense model of the comparison, but no more parameters or tokens."""
    variants = planner.comparison.variants
    equal = [name for name in runs if variants[name].tokens == 1 and variants[name].flops_of is None]
    dense = next((name for name in equal if is_dense(runs[name][0].config)), None)
    if dense is None:
        return []
    trials = []
    for name in equal:
        first, theirs = runs[name][0], runs[dense][0].config
        kind = kind_of(first.config)
        if kind is None or parameter_counts(first.config).blocks != parameter_counts(theirs).blocks:
            continue
        title = variants[name].title.format(budget=budget_text(str(first.config.exact_budget())))
        sources = {each: variants[each].rate_of or each for each in (dense, name)}
        trials.append(Trial(name, title, kind, difference(found, name, dense), rate_caveat(sources, tuned)))
    return trials


def _prices(planner: RunPlanner, rows: Sequence[VariantResult], found: Losses) -> list[Price]:
    """The variants that spend another one's FLOPs, where both have finished runs."""
    by_name = {row.name: row for row in rows}
    prices = []
    for row in rows:
        other = by_name.get(planner.comparison.variants[row.name].flops_of or "")
        if other is not None:
            times = row.training_flops / other.training_flops
            gap = difference(found, row.name, other.name)
            prices.append(Price(row.title, other.title, row.parameters, row.tokens, times, gap))
    return prices


def _pairs(planner: RunPlanner, rows: Sequence[VariantResult], found: Losses) -> list[PairResult]:
    """Forks against none in training and at test time; part of the tokens against all of them."""
    titles = {row.name: row.title for row in rows}
    one = next(
        (row.name for row in rows if row.routing == "causal" and row.budget == "1" and _whole(planner, row)), None
    )
    pairs = []

    def ask(ours: str, theirs: str) -> None:
        if (found_difference := difference(found, ours, theirs)) is not None:
            pairs.append(PairResult(titles[ours], titles[theirs], found_difference))

    for row in rows:
        if RULES[row.routing].router is not None and row.budget != "1":
            if one is not None and _whole(planner, row):
                ask(row.name, one)
            to_one = row.at_budget["1"].to_own
            turned = Estimate(-to_one.mean, -to_one.high, -to_one.low, to_one.seeds, to_one.blocks)
            pairs.append(PairResult(row.title, "the same models at test budget 1", turned))
    for row in rows:
        if planner.comparison.variants[row.name].tokens < 1:
            for other in rows:
                if _whole(planner, other) and other.routing in ("none", "copy"):
                    ask(row.name, other.name)
    return pairs


def _whole(planner: RunPlanner, row: VariantResult) -> bool:
    """Whether a variant was trained on as many tokens as the recipe says."""
    variant = planner.comparison.variants[row.name]
    return variant.tokens == 1 and (variant.flops_of is None or variant.spend != "tokens")


def _seconds(folder: Path) -> list[float]:
    """Training time up to each logged step, whatever evaluations, checkpoints and interruptions came between."""
    total, before, times = 0.0, 0, []
    for row in _training_rows(folder):
        total += (row["tokens"] - before) / row["tokens_per_second"]
        before = row["tokens"]
        times.append(total)
    return times


def _rate(folder: Path) -> float:
    """Tokens per second of a whole run; nan for a run too short to be logged."""
    rows = _training_rows(folder)
    return rows[-1]["tokens"] / _seconds(folder)[-1] if rows else math.nan


def _peak_memory(folder: Path) -> int:
    return max((int(row.get("peak_memory", 0)) for row in _training_rows(folder)), default=0)


def _training_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / METRICS_NAME) if "loss" in row]


def _curve(runs: Sequence[Run]) -> list[Point]:
    """Validation on the way, step by step."""
    at_step: dict[int, list[tuple[dict[str, Any], float]]] = {}
    for run in runs:
        rows, times = _training_rows(run.folder), _seconds(run.folder)
        for row in read_metrics(run.folder / METRICS_NAME):
            if "eval_loss" in row:
                seconds = float(np.interp(row["tokens"], [0, *(each["tokens"] for each in rows)], [0.0, *times]))
                at_step.setdefault(row["step"], []).append((row, seconds))
    return [_point([row for row, _ in at], [seconds for _, seconds in at]) for at in at_step.values()]


def _point(rows: Sequence[Mapping[str, Any]], seconds: Sequence[float]) -> Point:
    losses = [row["eval_loss"] for row in rows]
    tokens, flops = (fmean(row[name] for row in rows) for name in ("tokens", "flops"))
    return Point(tokens, flops, fmean(seconds), fmean(losses), min(losses), max(losses))
