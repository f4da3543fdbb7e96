"""Validation losses of a run, on its way and at its end."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import reduce
from torch.utils.data import DataLoader, Subset

from thoughtbubbles.data.feed.rundata import Batch, Rows, Validation
from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.loss import IGNORE_INDEX
from thoughtbubbles.support.errors import RunError
from thoughtbubbles.support.sampling import spread
from thoughtbubbles.support.signals import interrupted
from thoughtbubbles.training.sharding import release

if TYPE_CHECKING:
    from thoughtbubbles.training.loop import Loop

# Perplexities beyond are not numbers in double precision.
MOST_NATS = 700.0


def measure(loop: "Loop", rows: int | None) -> dict[str, float]:
    """Validation losses in nats per token, over `rows` of each set, evenly spaced.

    `eval_loss` and `eval_perplexity` at the model's own budget, the sets' losses weighted by their shares;
    `eval_bits_per_byte` where the data know how many bytes their tokens stand for; `eval_loss/NAME` of each set
    where there are several; `eval_loss/budget_B` at each of `eval_budgets`.

    Raises:
        RunInterrupted: if a signal asks to stop.
        RunError: for a loss that is not finite.
    """
    sets = loop.data.validation
    own = {name: _mean_loss(loop, each, rows, None) for name, each in sets.items()}
    loss = _weigh(loop, own)
    metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, MOST_NATS))}
    if all(each.tokens_per_byte is not None for each in sets.values()):
        bits = {name: own[name] * (each.tokens_per_byte or 0) / math.log(2) for name, each in sets.items()}
        metrics["eval_bits_per_byte"] = _weigh(loop, bits)
    if len(own) > 1:
        metrics |= {f"eval_loss/{name}": value for name, value in own.items()}
    for budget in loop.recipe.training.eval_budgets or []:
        losses = {name: _mean_loss(loop, each, rows, budget) for name, each in sets.items()}
        metrics[f"eval_loss/budget_{budget}"] = _weigh(loop, losses)
    return metrics


def _weigh(loop: "Loop", values: dict[str, float]) -> float:
    return sum(loop.data.validation[name].weight * value for name, value in values.items())


@torch.no_grad()
def _mean_loss(loop: "Loop", validation: Validation, rows: int | None, budget: Budget | None) -> float:
    """Mean over all targets, each process measuring its share of the rows."""
    loop.model.eval()
    sums = torch.zeros(2, dtype=torch.float32 if loop.device.type == "mps" else torch.float64, device=loop.device)
    for batch in _eval_batches(loop, validation.rows, rows):
        if loop.stop.requested and loop.state.num_processes == 1:
            raise interrupted(loop.stop, loop.step)
        inputs = loop.on_device(batch)
        with loop.autocast():
            loss = loop.model(**inputs, budget=budget, num_items_in_batch=1, return_logits=False).loss
        targets = inputs["labels"][:, 1:] != IGNORE_INDEX
        sums += torch.stack([loss.to(sums.dtype), targets.sum().to(sums.dtype)])
        loop.tell("on_eval_batch")
    release(loop.model)
    total, targets = reduce(sums, "sum").tolist()
    if not math.isfinite(total):
        raise RunError(f"evaluation after step {loop.step}: the loss is {total}, expected a finite number")
    return total / targets if targets else math.nan


def _eval_batches(loop: "Loop", validation: Rows, rows: int | None) -> Iterator[Batch]:
    """The batches of this process.

    A divided model needs as many on all processes, and a compiled one wants all of one shape: they are filled up
    with a row that has no targets.
    """
    picked, size, count = spread(len(validation), rows), loop.micro_batch_size, loop.state.num_processes
    ours = picked[loop.state.process_index :: count]
    filled = 0
    if loop.divided or loop.compiled:
        filled = math.ceil(len(picked) / (size * count)) * size - len(ours)
    loader: DataLoader[Any] = DataLoader(
        Subset(validation, [*ours, *picked[:1] * filled]),  # type: ignore[arg-type]
        batch_size=size,
        collate_fn=loop.data.collate,
        generator=torch.Generator(),
    )
    for number, batch in enumerate(loader):
        batch["labels"][max(0, len(ours) - number * size) :] = IGNORE_INDEX
        yield batch
