"""A run in memory: what its loop, its evaluations and its callbacks share."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.optim import Optimizer

from thoughtbubbles.data.feed.rundata import Batch, RunData, check_batch
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.recipes.training import Recipe
from thoughtbubbles.support.files import partial_path, replacing
from thoughtbubbles.support.signals import StopRequest

__all__ = ["Callback"]

MetricsRow = Mapping[str, Any]


class Session:
    """A run as far as it has come.

    Args:
        precision: float32, or bfloat16 for autocast.
        stop: says when a signal asks to stop.

    Attributes:
        model: what is trained.
        state: of the processes: which this is of how many, on which device.
        steps: of the whole run.
        step: optimizer steps taken.
        micro_batch_size: rows of one forward pass on one device, of which a step has `passes`.
        divided: whether each process holds its share of the model.
        compiled: whether the model is.
    """

    optimizer: Optimizer

    def __init__(
        self,
        recipe: Recipe,
        model: ThoughtbubblesForCausalLM,
        data: RunData,
        state: PartialState,
        precision: str,
        stop: StopRequest,
        callbacks: Sequence["Callback"],
    ) -> None:
        self.recipe, self.model, self.data, self.state = recipe, model, data, state
        self.precision, self.stop, self.callbacks = precision, stop, callbacks
        self.device, self.steps, self.step = state.device, recipe.training.steps, 0
        self.micro_batch_size, self.passes = check_batch(recipe, state.num_processes)
        self.divided = recipe.training.sharding == "fsdp" and state.num_processes > 1
        self.compiled = recipe.training.compile != "none"

    def autocast(self) -> AbstractContextManager[Any]:
        """What forward passes compute in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def on_device(self, batch: Batch) -> Batch:
        """A batch where the model is."""
        return {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}

    def replacing(self, path: Path) -> AbstractContextManager[Path]:
        """As `files.replacing` by the first process; the others get the temporary name that it writes to."""
        return replacing(path) if self.state.is_main_process else nullcontext(partial_path(path))

    def tell(self, event: str, *arguments: Any) -> None:
        """Call a method of every callback."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)


class Callback:
    """Does something beside the steps of a run. Every process calls it; `session.step` counts the steps taken."""

    def on_begin(self, session: Session) -> None:
        """Before the first step, with the checkpoint loaded."""

    def on_step_begin(self, session: Session) -> None:
        """Before a step."""

    def on_step_end(self, session: Session) -> None:
        """After a step, before anything of it is written."""

    def on_eval_batch(self, session: Session) -> None:
        """After a batch of an evaluation."""

    def on_evaluate(self, session: Session) -> None:
        """After an evaluation."""

    def on_row(self, session: Session, row: MetricsRow) -> None:
        """When a row of metrics.jsonl is made."""

    def on_end(self, session: Session) -> None:
        """When the loop ends, however it ends."""
