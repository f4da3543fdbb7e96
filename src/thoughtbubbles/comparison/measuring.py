"""What is measured of each trained model; measurements.json in the folder of its run."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thoughtbubbles.data.feed.rundata import RunData
from thoughtbubbles.model.budget import Budget, parse_budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
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
        losses: at each budget, as text: the mean loss of each block in nats per token, one forward a block.
        prefix: at the own budget, of each of the first blocks: mean loss of a few predictions, each made from its
            prefix alone, minus that of the same predictions made with the whole block.
    """

    settings: dict[str, Any]
    own: str
    losses: dict[str, list[float]]
    prefix: list[float]

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
    """How a model is measured, as it stands in measurements.json: all but the batch size has an effect."""
    values = {**asdict(evaluation), "budgets": [str(parse_budget(each)) for each in evaluation.budgets]}
    del values["batch_size"]
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
    """
    from thoughtbubbles.evaluation.perplexity import token_losses
    from thoughtbubbles.model.loading import load_model

    model = load_model(folder)
    own = str(model.config.exact_budget())
    blocks = validation_blocks(data, evaluation.blocks)
    losses = {
        budget: token_losses(model, blocks, budget=budget, batch_size=evaluation.batch_size, on_progress=on_progress)
        for budget in test_budgets(model.config, evaluation.budgets)
    }
    made = Measurements(
        settings=measurement_settings(evaluation, data.identity),
        own=own,
        losses={budget: each.double().mean(1).tolist() for budget, each in losses.items()},
        prefix=_prefix_differences(model, data, evaluation, on_progress).tolist(),
    )
    made.write(folder)
    return made


def validation_blocks(data: RunData, count: int) -> Tensor:
    """Evenly spaced validation blocks [n, T] int64, of several corpora by their shares."""
    parts = []
    for validation in data.validation.values():
        indices = spread(len(validation.rows), max(1, round(count * validation.weight)))
        parts.append(torch.stack([validation.rows[index]["input_ids"] for index in indices]))
    return torch.cat(parts)


def _prefix_differences(
    model: "ThoughtbubblesForCausalLM",
    data: RunData,
    evaluation: EvaluationSection,
    on_progress: Callable[[int], None] | None,
) -> Tensor:
    """[n], see `Measurements.prefix`."""
    from thoughtbubbles.evaluation.perplexity import token_losses

    blocks = validation_blocks(data, evaluation.prefix_blocks)
    positions = _positions(data.longest, evaluation.prefix_positions)
    blockwise, prefix = (
        token_losses(
            model, blocks, mode, batch_size=evaluation.batch_size, positions=positions, on_progress=on_progress
        )
        for mode in ("blockwise", "prefix")
    )
    return (prefix.double() - blockwise.double()).mean(1)


def _positions(length: int, count: int) -> list[int]:
    """Evenly spaced tokens of a block, each from the middle of its share."""
    count = min(count, length - 1)
    return [1 + (2 * place + 1) * (length - 1) // (2 * count) for place in range(count)]
