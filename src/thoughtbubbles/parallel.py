"""Memory of one process among several that train a model together."""

from collections.abc import Callable
from dataclasses import replace

from thoughtbubbles.accounting import WIDE, StateBytes, item_bytes, parameter_counts, state_bytes
from thoughtbubbles.configuration import ThoughtbubblesConfig
from thoughtbubbles.training.recipe import SHARDINGS

USABLE_MEMORY = 0.9
"""Share of a device's memory that is counted on: libraries and fragmentation take the rest."""


def process_bytes(
    config: ThoughtbubblesConfig,
    precision: str = "float32",
    gradient_checkpointing: bool = False,
    processes: int = 1,
    sharding: str = "ddp",
) -> StateBytes:
    """Bytes that one of several processes needs in a training step whatever its rows are.

    With `ddp` every process holds everything, and buckets as large as the gradients, in which they are averaged. With
    `fsdp` (FSDP2, a group for each block and one for the rest) it holds its share of weights, gradients and moments,
    and gathers the rest for the whole step, in float32, and in the precision of training a block while it is at work
    and the next one while it arrives; beside them the gradients of both groups before they are shared out, a block's
    in float32 too. The blocks' bfloat16 numbers are then the gathered ones.

    Args:
        precision: float32 or bfloat16.
        gradient_checkpointing: as in `state_bytes`.
        processes: how many there are; one alone shares nothing, whatever `sharding` is.
        sharding: `ddp` or `fsdp`.

    Raises:
        ValueError: for another precision or sharding.
    """
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding={sharding!r}: expected one of {', '.join(SHARDINGS)}")
    whole = state_bytes(config, precision, gradient_checkpointing)
    if processes == 1:
        return whole
    if sharding == "ddp":
        return replace(whole, exchange=whole.gradients)
    block, rest = _groups(config)
    item = item_bytes(precision)
    return StateBytes(
        weights=-(-whole.weights // processes),
        gradients=-(-whole.gradients // processes),
        optimizer=-(-whole.optimizer // processes),
        casts=0,
        loss=whole.loss,
        exchange=WIDE * rest + item * 2 * block + WIDE * rest + item * block + WIDE * block,
    )


def largest_micro_batch(share: int, total: Callable[[int], int], usable: float) -> int | None:
    """Rows of the largest micro-batch that divides a device's share of the batch and fits; None if not even one does.

    Args:
        share: rows of the batch that one device gets.
        total: bytes of training with so many rows.
        usable: bytes of the device that are counted on.
    """
    divisors = (rows for rows in range(share, 0, -1) if share % rows == 0)
    return next((rows for rows in divisors if total(rows) <= usable), None)


def _groups(config: ThoughtbubblesConfig) -> tuple[int, int]:
    """Parameters of a block, and of all that is in no block."""
    parts, layers = parameter_counts(config), config.num_hidden_layers
    final_norm = config.hidden_size * (1 + config.use_bias)
    block = (parts.blocks - final_norm) // layers
    return block, parts.total - layers * block
