"""What `thoughtbubbles inspect` finds out and writes: of one text, or of a corpus."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from thoughtbubbles.inspection import figures
from thoughtbubbles.inspection.ablation import Ablation, ablate
from thoughtbubbles.inspection.bubbles import mark_bubbles, shade_bubbles
from thoughtbubbles.inspection.survey import CorpusStatistics
from thoughtbubbles.inspection.trace import BubbleTrace, to_ids, trace_bubbles
from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.model.routing import LEAK
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.files import json_text, write_text
from thoughtbubbles.support.folders import Marks, filling
from thoughtbubbles.support.statistics import Curve
from thoughtbubbles.support.tables import console_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIKELIHOOD = f"; leaks: {LEAK}, so this is no left-to-right likelihood"
MARKS: Marks = {
    "trace.json": ("surprisal", "streams", "tokens_cut"),
    "statistics.json": ("reference_loss", "streams_by_layer", "confidence"),
}
"""What says that a folder is one of an earlier inspection."""
MOST_ABLATIONS = 32
WORD_BLOCKS = 1000
"""Training blocks in which the words of a corpus are counted."""


@dataclass(frozen=True)
class TextReport:
    """What is known of one text.

    Attributes:
        trace: of the text.
        ablation: of the tokens with the largest bubbles, up to 32; None for a model without gates.
        token: the one whose family tree is drawn.
        tokens_cut: of the text, which were more than the model takes.
    """

    trace: BubbleTrace
    ablation: Ablation | None
    token: int
    tokens_cut: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it."""
        ablation = None if self.ablation is None else asdict(self.ablation)
        return {**self.trace.to_dict(), "ablation": ablation, "tokens_cut": self.tokens_cut}


def inspect_text(
    model: ThoughtbubblesForCausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    budget: Budget | None = None,
    token: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> TextReport:
    """Trace a text, cut to what the model takes, and delete its largest bubbles one at a time.

    Args:
        token: whose family tree is wanted; None is the token with the largest bubble.
        on_progress: called with the number of bubbles deleted since the last call.

    Raises:
        InputError: for an empty text where the tokenizer has no token to start with, or a token that it lacks.
        ValueError: for a bad budget.
    """
    every = to_ids(tokenizer, text)
    ids = every[: model.config.max_position_embeddings]
    if not ids:
        raise InputError("text '': expected at least one token")
    if token is not None and not 0 <= token < len(ids):
        raise InputError(f"token {token}: expected one from 0 to {len(ids) - 1}, the tokens of the text")
    trace = trace_bubbles(model, tokenizer, ids, budget)
    sizes = trace.bubble_sizes()
    streams = sizes.sum(0)
    largest = [int(place) for place in (-streams).argsort(kind="stable")]
    ablation = None
    if model.config.gated_layers:
        chosen = sorted(place for place in largest[:MOST_ABLATIONS] if sizes[:, place].max() > 1)
        ablation = ablate(model, ids, chosen, budget, on_progress=on_progress)
    return TextReport(trace, ablation, largest[0] if token is None else token, len(every) - len(ids))


def show_report(report: TextReport) -> None:
    """Print a text, each token marked with its streams in the last block, and what it cost and gave.

    Where the output is no terminal, streams stand as numbers.
    """
    trace = report.trace
    sizes = trace.bubble_sizes()[-1].tolist()
    console = Console(soft_wrap=True)
    if console.is_terminal:
        console.print(shade_bubbles(trace.tokens, sizes))
    else:
        print(mark_bubbles(trace.tokens, sizes))
    print(f"\n{trace.setting}: {np.mean(sizes):.2f} streams per token in the last block")
    if trace.surprisal:
        print(f"loss {np.mean(trace.surprisal):.4f} nats per token{LIKELIHOOD if trace.leaks else ''}")
    if report.ablation is not None and report.ablation.tokens:
        changes = report.ablation.at_lag(0)
        most = max(range(len(changes)), key=lambda i: abs(changes[i]), default=None)
        if most is not None:
            place = report.ablation.tokens[most]
            print(
                f"deleting the forks of one token changes its surprisal most at token {place}, "
                f"{trace.tokens[place]!r}: {changes[most]:+.4f} nats"
            )


def show_statistics(found: CorpusStatistics) -> None:
    """Print the main figures, with their bands."""
    leak = LIKELIHOOD if found.leaks else ""
    print(f"{found.setting}; {found.tokens:,} tokens in {found.blocks:,} block{'s' * (found.blocks != 1)}")
    print(f"loss {found.loss:.4f} nats per token{leak}")
    if found.reference_loss is not None:
        print(f"loss of the reference model {found.reference_loss:.4f} nats per token")
    sections = [("", list(_curve_rows(title, curve))) for title, curve in _main_curves(found)]
    heading = f"means, and {found.confidence:.0%} bands over blocks"
    table = console_table(["", "mean", "from", "to", "tokens"], sections, title=heading, title_justify="left")
    Console(soft_wrap=True).print(table)


def _curve_rows(title: str, curve: Curve) -> Iterator[list[str]]:
    for x, mean, low, high, count in zip(curve.x, curve.mean, curve.low, curve.high, curve.count, strict=True):
        ends = ("" if end is None else f"{end:.4f}" for end in (low, high))
        place = x if isinstance(x, str) else f"{x:.4g}"
        yield [title.format(place), f"{mean:.4f}", *ends, f"{count:,}"]


def _main_curves(found: CorpusStatistics) -> list[tuple[str, Curve]]:
    curves = [
        ("streams in block {}", found.streams_by_layer),
        ("bubble size at entropy {}", found.size_by_entropy["model"]),
        ("bubble size, {}", found.size_by_piece),
    ]
    if found.ablation is not None:
        curves.append(("forks deleted {} tokens before, nats", found.ablation))
    return curves


def write_report(report: TextReport, folder: Path) -> list[Path]:
    """Write a report to a folder that is there: trace.parquet, trace.json, and pictures as PNG and SVG; their paths."""
    trace = report.trace
    drawn = {
        "streams": figures.draw_streams(trace),
        "scores": figures.draw_final_scores(trace),
        "tree": figures.draw_tree(trace, report.token),
    }
    if report.ablation is not None and report.ablation.tokens:
        drawn["ablation"] = figures.draw_ablation(trace, report.ablation)
    with filling(folder) as files:
        trace.save(files / "trace.parquet")
        written = [files / "trace.parquet", *_write(files, "trace", report.to_dict(), drawn)]
    return [folder / path.name for path in written]


def write_statistics(found: CorpusStatistics, folder: Path) -> list[Path]:
    """Write statistics to a folder that is there: statistics.json, and pictures as PNG and SVG; their paths."""
    drawn = {"uncertainty": figures.draw_uncertainty(found), "overview": figures.draw_overview(found)}
    if found.ablation is not None:
        drawn["ablation"] = figures.draw_effect(found)
    with filling(folder) as files:
        written = _write(files, "statistics", found.to_dict(), drawn)
    return [folder / path.name for path in written]


def check_reference(model: ThoughtbubblesForCausalLM, reference: ThoughtbubblesForCausalLM, name: str) -> None:
    """Check that a reference model is dense and reads the model's tokens.

    Raises:
        InputError: it does not; `name` is how it was called.
    """
    if reference.config.routing != "none":
        raise InputError(f"reference {name}: routing is {reference.config.routing}, expected a dense model (none)")
    if reference.config.vocab_size < model.config.vocab_size:
        sizes = f"{reference.config.vocab_size}, expected at least the model's {model.config.vocab_size}"
        raise InputError(f"reference {name}: vocabulary of {sizes}")


def _write(folder: Path, name: str, content: Mapping[str, Any], drawn: Mapping[str, Figure]) -> list[Path]:
    path = folder / f"{name}.json"
    write_text(path, json_text(content) + "\n")
    return [path, *(made for title, figure in drawn.items() for made in figures.save_pictures(figure, folder, title))]
