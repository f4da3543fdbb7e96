"""Validation losses of a run, on its way and at its end."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import reduce
from torch.utils.data import DataLoader, Subset

from thoughtbubbles.data.feed.rundata import Batch, Rows, Validation
from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.loss import IGNORE_INDEX
from thoughtbubbles.support.errors import RunError
from thoughtbubbles.support.sampling import spread
from thoughtbubbles.support.signals import interrupted
from thoughtbubbles.training.session import Session
from thoughtbubbles.training.sharding import release

# Perplexities beyond are not numbers in double precision.
MOST_NATS = 700.0


def measure(session: Session, rows: int | None) -> dict[str, float]:
    """Validation losses in nats per token, over `rows` of each set, evenly spaced.

    `eval_loss` and `eval_perplexity` at the model's own budget, the sets' losses weighted by their shares;
    `eval_bits_per_byte` where the data know how many bytes their tokens stand for; `eval_loss/NAME` of each set
    where there are several; `eval_loss/budget_B` at each of `eval_budgets`.

    Raises:
        RunInterrupted: if a signal asks to stop.
        RunError: for a loss that is not finite.
    """
    sets = session.data.validation
    own = {name: _mean_loss(session, each, rows, None) for name, each in sets.items()}
    loss = _weigh(session, own)
    metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, MOST_NATS))}
    if all(each.tokens_per_byte is not None for each in sets.values()):
        bits = {name: own[name] * (each.tokens_per_byte or 0) / math.log(2) for name, each in sets.items()}
        metrics["eval_bits_per_byte"] = _weigh(session, bits)
    if len(own) > 1:
        metrics |= {f"eval_loss/{name}": value for name, value in own.items()}
    for budget in session.recipe.training.eval_budgets or []:
        losses = {name: _mean_loss(session, each, rows, budget) for name, each in sets.items()}
        metrics[f"eval_loss/budget_{budget}"] = _weigh(session, losses)
    return metrics


def _weigh(session: Session, values: dict[str, float]) -> float:
    return sum(session.data.validation[name].weight * value for name, value in values.items())


@torch.no_grad()
def _mean_loss(session: Session, validation: Validation, rows: int | None, budget: Budget | None) -> float:
    """Mean over all targets, each process measuring its share of the rows."""
    session.model.eval()
    sums = torch.zeros(2, dtype=torch.float32 if session.device.type == "mps" else torch.float64, device=session.device)
    for batch in _eval_batches(session, validation.rows, rows):
        if session.stop.requested and session.state.num_processes == 1:
            raise interrupted(session.stop, session.step)
        inputs = session.on_device(batch)
        with session.autocast():
            loss = session.model(**inputs, budget=budget, num_items_in_batch=1, return_logits=False).loss
        targets = inputs["labels"][:, 1:] != IGNORE_INDEX
        sums += torch.stack([loss.to(sums.dtype), targets.sum().to(sums.dtype)])
        session.tell("on_eval_batch")
    release(session.model)
    total, targets = reduce(sums, "sum").tolist()
    if not math.isfinite(total):
        raise RunError(f"evaluation after step {session.step}: the loss is {total}, expected a finite number")
    return total / targets if targets else math.nan


def _eval_batches(session: Session, validation: Rows, rows: int | None) -> Iterator[Batch]:
    """The batches of this process.

    A divided model needs as many on all processes, and a compiled one wants all of one shape: they are filled up
    with a row that has no targets.
    """
    picked, size, count = spread(len(validation), rows), session.micro_batch_size, session.state.num_processes
    ours = picked[session.state.process_index :: count]
    filled = 0
    if session.divided or session.compiled:
        filled = math.ceil(len(picked) / (size * count)) * size - len(ours)
    loader: DataLoader[Any] = DataLoader(
        Subset(validation, [*ours, *picked[:1] * filled]),  # type: ignore[arg-type]
        batch_size=size,
        collate_fn=session.data.collate,
        generator=torch.Generator(),
    )
    for number, batch in enumerate(loader):
        batch["labels"][max(0, len(ours) - number * size) :] = IGNORE_INDEX
        yield batch
