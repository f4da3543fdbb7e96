"""Whether a run fits the memory of what it runs on, and what does: the memory model of `thoughtbubbles plan`."""

from dataclasses import dataclass, replace

import torch

from thoughtbubbles.data.feed.rundata import check_batch
from thoughtbubbles.model.accounting import (
    USABLE_MEMORY,
    StateBytes,
    activation_bytes,
    count_parameters,
    largest_micro_batch,
    process_bytes,
)
from thoughtbubbles.model.budget import parse_budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.recipes.training import Recipe, RecipeError
from thoughtbubbles.support.errors import InputError, RunError
from thoughtbubbles.support.machine import device_memory, host_memory

GB = 1e9
WEIGHT_BYTES = 4


@dataclass(frozen=True)
class TrainingMemory:
    """What one process of a run holds.

    Attributes:
        recipe: of the run.
        config: of its model.
        length: tokens of its longest row.
        precision: float32 or bfloat16.
        processes: that share the run.
        device: that this one trains on.
    """

    recipe: Recipe
    config: ThoughtbubblesConfig
    length: int
    precision: str
    processes: int
    device: torch.device

    def check(self) -> None:
        """Refuse a model that cannot fit, whatever the rows of a micro-batch are.

        Raises:
            RecipeError: naming its shape.
        """
        check_weights(self.config)
        state = self._state(self.recipe.training.gradient_checkpointing)
        held, there = state.weights + state.gradients + state.optimizer, device_memory(self.device)
        if held > there:
            raise RecipeError(
                f"{_shape(self.config)}, whose weights, gradients and moments take {held / GB:,.1f} GB a device: "
                f"expected at most the {there / GB:,.1f} GB of this {self.device.type}"
            )

    def exceeded(self) -> InputError | RunError:
        """What to raise when memory has run out: it says what would fit.

        An `InputError` where the micro-batch is too large for the device, otherwise a `RunError`: something else holds
        the memory.
        """
        micro, there = check_batch(self.recipe, self.processes)[0], device_memory(self.device)
        begin = f"out of memory on {self.device.type}: training.micro_batch_size={micro} takes "
        begin += f"{self._total(micro) / GB:,.1f} of {there / GB:,.1f} GB by the model of `thoughtbubbles plan`"
        fits = self._largest(self.recipe.training.gradient_checkpointing)
        if fits == micro:
            return RunError(f"{begin}, which should fit: does another process hold memory?")
        hints = ["not one row fits" if fits is None else f"at most {fits} fits"]
        if not self.recipe.training.gradient_checkpointing and (more := self._largest(True)) not in (None, fits):
            hints.append(f"{more} with training.gradient_checkpointing=true")
        return RecipeError(f"{begin}; {', '.join(hints)}")

    def _largest(self, checkpointing: bool) -> int | None:
        """Rows of the largest micro-batch that fits."""
        share, usable = self.recipe.training.batch_size // self.processes, USABLE_MEMORY * device_memory(self.device)
        return largest_micro_batch(share, lambda rows: self._total(rows, checkpointing), usable)

    def _total(self, rows: int, checkpointing: bool | None = None) -> int:
        """Bytes of training with so many rows in a micro-batch."""
        settings, device = self.recipe.training, self.device.type
        checkpointing = settings.gradient_checkpointing if checkpointing is None else checkpointing
        budget = max(map(parse_budget, settings.training_budgets or ()), default=None)
        each = activation_bytes(self.config, self.length, budget, self.precision, checkpointing, device)
        return self._state(checkpointing).total + rows * each.total

    def _state(self, checkpointing: bool) -> StateBytes:
        """Bytes whatever the rows are; gradients and moments of adapters count for nothing."""
        settings = self.recipe.training
        state = process_bytes(self.config, self.precision, checkpointing, self.processes, settings.sharding)
        return state if settings.lora is None else replace(state, gradients=0, optimizer=0)


def check_weights(config: ThoughtbubblesConfig) -> None:
    """Refuse a model whose weights alone are more than this machine holds.

    Raises:
        RecipeError: naming its shape.
    """
    weights, there = WEIGHT_BYTES * count_parameters(config), host_memory()
    if weights > there:
        raise RecipeError(
            f"{_shape(config)}, whose weights take {weights / GB:,.1f} GB: expected at most the {there / GB:,.1f} GB "
            "of this machine"
        )


def _shape(config: ThoughtbubblesConfig) -> str:
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    fields = ", ".join(f"model.{name}={getattr(config, name)}" for name in names)
    return f"{fields}: {count_parameters(config):,} parameters"
