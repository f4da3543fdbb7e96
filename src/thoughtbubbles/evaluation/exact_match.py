"""Exact match: the share of questions that a model answers letter for letter, by difficulty and budget."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from thoughtbubbles.evaluation.answering import Answer, Question, answer_questions, make_batches
from thoughtbubbles.evaluation.evaluate import choose_budgets
from thoughtbubbles.model.loading import load_config, load_model, load_tokenizer
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.files import json_text, write_text
from thoughtbubbles.support.folders import Marks
from thoughtbubbles.support.machine import describe_machine
from thoughtbubbles.support.progress import say, stage
from thoughtbubbles.support.statistics import Scores
from thoughtbubbles.support.tables import markdown_table

RESULT_NAME, ANSWERS_NAME, PLOT_NAME = "exact_match.json", "answers.jsonl", "exact_match.png"
# What says that a folder is one of an earlier measurement.
MARKS: Marks = {RESULT_NAME: ("source", "scores", "made_with")}


@dataclass(frozen=True)
class Score:
    """Exact match at a budget.

    Attributes:
        budget: streams per token, as text.
        difficulty: of the questions; None is all of them together.
        n: questions.
        value: the share answered right.
        stderr: its standard error over questions; None for a single one.
    """

    budget: str
    difficulty: int | None
    n: int
    value: float
    stderr: float | None


@dataclass(frozen=True)
class ExactMatch:
    """What a measurement came to.

    Attributes:
        model: as it was named.
        source: of the questions.
        routing: of the model.
        device: type of device that it ran on.
        answers: of each budget, in the order of the questions.
    """

    model: str
    source: str
    routing: str
    device: str
    answers: Sequence[Answer]

    @property
    def budgets(self) -> list[str]:
        """In the order in which they were asked for."""
        return list(dict.fromkeys(answer.budget for answer in self.answers))

    def scores(self) -> list[Score]:
        """Of each budget: those of the difficulties in ascending order, then that of all questions."""
        found = []
        for budget in self.budgets:
            here = [answer for answer in self.answers if answer.budget == budget]
            for difficulty in [*sorted({answer.question.difficulty for answer in here}), None]:
                chosen = [answer for answer in here if difficulty in (None, answer.question.difficulty)]
                scores = Scores.of("mean", [(float(answer.right), 1.0) for answer in chosen])
                error = scores.standard_error
                stderr = None if math.isnan(error) else error
                found.append(Score(budget, difficulty, len(chosen), scores.estimate, stderr))
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with how many answers the row's end cut, the commit, the machine and versions."""
        return {
            "model": self.model,
            "source": self.source,
            "routing": self.routing,
            "cut": sum(answer.cut for answer in self.answers),
            "scores": [asdict(score) for score in self.scores()],
            "made_with": describe_machine(self.device),
        }

    def table(self) -> str:
        """A table in Markdown, a row for each difficulty, a column for each budget."""
        cells = {(score.difficulty, score.budget): score for score in self.scores()}
        rows = []
        for difficulty in dict.fromkeys(difficulty for difficulty, _ in cells):
            here = [cells[difficulty, budget] for budget in self.budgets]
            values = (f"{100 * score.value:.1f}%{_error(score.stderr)}" for score in here)
            rows.append(["all" if difficulty is None else str(difficulty), f"{here[0].n:,}", *values])
        return markdown_table(["difficulty", "questions", *(f"budget {budget}" for budget in self.budgets)], rows)

    def write(self, folder: Path) -> list[Path]:
        """Write exact_match.json and answers.jsonl into a folder that is there; their paths."""
        result, answers = folder / RESULT_NAME, folder / ANSWERS_NAME
        rows = [
            {"budget": each.budget, **asdict(each.question), "written": each.written, "right": each.right}
            for each in self.answers
        ]
        write_text(answers, "".join(json_text(row) + "\n" for row in rows))
        write_text(result, json_text(self.to_dict(), indent=2) + "\n")
        return [result, answers]


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {100 * stderr:.1f}"


def lines_of(found: ExactMatch) -> dict[str, list[tuple[float, float, float]]]:
    """For a plot: a line of each budget, its points (difficulty, share, standard error)."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for score in found.scores():
        if score.difficulty is not None:
            point = (float(score.difficulty), score.value, score.stderr or 0.0)
            lines.setdefault(f"budget {score.budget}", []).append(point)
    return lines


def measure_exact_match(
    model: str,
    questions: Sequence[Question],
    source: str,
    budgets: Sequence[Fraction] | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> ExactMatch:
    """Ask a trained model.

    Args:
        model: a run's folder, a model's folder, or a hub name.
        questions: to ask.
        source: names them in messages and in the result.
        budgets: streams per token; None is the model's own.
        batch_size: questions at a time; no answer depends on it.
        progress: show a bar.

    Raises:
        InputError: for a model, its tokenizer or a budget that cannot be used, or as `make_batches`.
    """
    config, tokenizer = load_config(model), load_tokenizer(model)
    chosen = choose_budgets(config, budgets, progress)
    if tokenizer.eos_token_id is None:
        raise InputError(f"model {model}: expected a tokenizer with an eos token beside it")
    batches = make_batches(tokenizer, questions, source, config.max_position_embeddings, batch_size)
    loaded = load_model(model)
    answers: list[Answer] = []
    with stage("Answering", len(questions) * len(chosen), progress) as bar:
        note = partial(bar.advance, note="questions")
        for budget in chosen:
            answers += answer_questions(loaded, tokenizer, batches, budget, note)
        bar.show("questions")
    if cut := sum(answer.cut for answer in answers):
        say(
            f"{cut:,} answers were cut at the end of the longest row: {config.max_position_embeddings} tokens", progress
        )
    return ExactMatch(model, source, config.routing, loaded.device.type, answers)
