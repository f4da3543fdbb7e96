"""What is measured of each trained model; measurements.json in the folder of its run."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thoughtbubbles.data.feed.rundata import RunData
from thoughtbubbles.data.sources.identity import content_facts
from thoughtbubbles.model.budget import Budget, parse_budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.loss import IGNORE_INDEX
from thoughtbubbles.recipes.comparison import EvaluationSection
from thoughtbubbles.support.files import read_as, write_text
from thoughtbubbles.support.sampling import spread

if TYPE_CHECKING:
    from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM

MEASUREMENTS_NAME = "measurements.json"


@dataclass(frozen=True)
class Measurements:
    """Losses of a trained model, block by block, so that models are compared on each block.

    Attributes:
        settings: how they were measured.
        own: the model's budget, as text.
        losses: at each budget, as text: the mean loss of each block, or of what is to be learnt of each row, in nats
            per token, one forward each.
        prefix: at the own budget, of each of the first blocks: mean loss of a few predictions, each made from its
            prefix alone, minus that of the same predictions made with the whole block.
        difficulties: of each question, where the recipe names questions.
        right: at each budget, as text: which questions were answered right.
    """

    settings: dict[str, Any]
    own: str
    losses: dict[str, list[float]]
    prefix: list[float]
    difficulties: list[int]
    right: dict[str, list[bool]]

    @classmethod
    def read(cls, folder: Path) -> "Measurements | None":
        """Those of a run, or None if there are none.

        Raises:
            InputError: if they are not as they were written; removed, they are made again.
        """
        path = folder / MEASUREMENTS_NAME
        return read_as(cls, path) if path.exists() else None

    def write(self, folder: Path) -> None:
        """Write measurements.json, whole or not at all."""
        write_text(folder / MEASUREMENTS_NAME, json.dumps(asdict(self)) + "\n")


def measurement_settings(evaluation: EvaluationSection, identity: str) -> dict[str, Any]:
    """How a model is measured, as it stands in measurements.json: all but the batch size has an effect.

    Raises:
        InputError: for questions that cannot be read.
    """
    values = {**asdict(evaluation), "budgets": [str(parse_budget(each)) for each in evaluation.budgets]}
    del values["batch_size"]
    if evaluation.questions is not None:
        values["questions"] = list(*content_facts([Path(evaluation.questions)]))
    return {**values, "data": identity}


def test_budgets(config: ThoughtbubblesConfig, budgets: list[Budget]) -> list[str]:
    """At which budgets a model is measured: its own, 1, and `budgets` where it has gates; those that it can have."""
    wanted = {config.exact_budget()}
    if config.routing != "none":
        wanted.add(parse_budget(1))
    if config.gated_layers:
        wanted |= {parse_budget(each) for each in budgets}
    return [str(each) for each in sorted(wanted)]


def measure_run(
    folder: Path, data: RunData, evaluation: EvaluationSection, on_progress: Callable[[int], None] | None = None
) -> Measurements:
    """Measure the model of a finished run and write measurements.json.

    Args:
        folder: of the run.
        on_progress: called with the number of tokens predicted since the last call.

    Raises:
        InputError: for questions that cannot be read, or that the model cannot be asked.
    """
    from thoughtbubbles.model.loading import load_model

    model = load_model(folder)
    own = str(model.config.exact_budget())
    ruler = _Ruler(model, evaluation.batch_size, on_progress)
    lots = validation_lots(data, evaluation.blocks)
    budgets = test_budgets(model.config, evaluation.budgets)
    difficulties, right = _answers(folder, evaluation, budgets)
    made = Measurements(
        settings=measurement_settings(evaluation, data.identity),
        own=own,
        losses={budget: ruler.means(lots, budget=budget).tolist() for budget in budgets},
        prefix=_prefix_differences(ruler, data, evaluation).tolist(),
        difficulties=difficulties,
        right=right,
    )
    made.write(folder)
    return made


def _answers(
    folder: Path, evaluation: EvaluationSection, budgets: list[str]
) -> tuple[list[int], dict[str, list[bool]]]:
    """The difficulty of each question, and which of them were answered right at each budget."""
    if evaluation.questions is None:
        return [], {}
    from thoughtbubbles.evaluation.answering import read_questions
    from thoughtbubbles.evaluation.exact_match import measure_exact_match

    source = evaluation.questions
    questions = read_questions(Path(source))
    asked = measure_exact_match(
        str(folder), questions, source, [parse_budget(each) for each in budgets], progress=False
    )
    # Each budget has all questions in their order.
    rows = [asked.answers[start : start + len(questions)] for start in range(0, len(asked.answers), len(questions))]
    right = {budget: [answer.right for answer in some] for budget, some in zip(budgets, rows, strict=True)}
    return [question.difficulty for question in questions], right


@dataclass(frozen=True)
class Lot:
    """Validation rows of one length of which the same tokens are predicted.

    Attributes:
        places: [n] of the rows among all that are measured.
        rows: [n, T] int64.
        positions: tokens to predict, from 1 to T - 1, in ascending order.
    """

    places: list[int]
    rows: Tensor
    positions: list[int]


def validation_lots(data: RunData, count: int) -> list[Lot]:
    """Evenly spaced validation rows, of several corpora by their shares, those that are measured alike together.

    Of a block every token but the first is predicted, of an example what is to be learnt.
    """
    found: dict[tuple[int, tuple[int, ...]], list[tuple[int, Tensor]]] = {}
    place = 0
    for validation in data.validation.values():
        for index in spread(len(validation.rows), max(1, round(count * validation.weight))):
            batch = data.collate([validation.rows[index]])
            tokens = batch["input_ids"][0]
            learnt = (batch["labels"][0] != IGNORE_INDEX).nonzero()[:, 0].tolist()
            positions = tuple(position for position in learnt if position > 0)
            found.setdefault((len(tokens), positions), []).append((place, tokens))
            place += 1
    return [
        Lot([place for place, _ in rows], torch.stack([tokens for _, tokens in rows]), list(positions))
        for (_, positions), rows in found.items()
    ]


@dataclass(frozen=True)
class _Ruler:
    """Measures losses of a model, so many rows at a time, and tells of each token."""

    model: "ThoughtbubblesForCausalLM"
    batch_size: int
    on_progress: Callable[[int], None] | None

    def means(self, lots: list[Lot], mode: str = "blockwise", budget: str | None = None) -> Tensor:
        """[n] float64: the mean loss of each row over the predicted tokens."""
        from thoughtbubbles.evaluation.perplexity import token_losses

        means = torch.zeros(sum(len(lot.places) for lot in lots), dtype=torch.float64)
        for lot in lots:
            losses = token_losses(
                self.model,
                lot.rows,
                mode,
                budget,
                batch_size=self.batch_size,
                positions=lot.positions,
                on_progress=self.on_progress,
            )
            means[lot.places] = losses.double().mean(1)
        return means


def _prefix_differences(ruler: _Ruler, data: RunData, evaluation: EvaluationSection) -> Tensor:
    """[n], see `Measurements.prefix`."""
    lots = [
        replace(lot, positions=_thinned(lot.positions, evaluation.prefix_positions))
        for lot in validation_lots(data, evaluation.prefix_blocks)
    ]
    blockwise, prefix = (ruler.means(lots, mode) for mode in ("blockwise", "prefix"))
    return prefix - blockwise


def _thinned(positions: list[int], count: int) -> list[int]:
    """Evenly spaced ones of some positions, each from the middle of its share."""
    count = min(count, len(positions))
    return [positions[(2 * place + 1) * len(positions) // (2 * count)] for place in range(count)]
