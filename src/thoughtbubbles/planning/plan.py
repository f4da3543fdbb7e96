"""What a model will cost before it is trained: the report of `thoughtbubbles plan`.

The numbers of one row or token come from `accounting`; here they become those of a run on a device.
"""

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from thoughtbubbles.model.accounting import (
    ParameterCounts,
    activation_bytes,
    cache_bytes,
    decoding_flops,
    dense_twin,
    forward_flops,
    item_bytes,
    layer_widths,
    parameter_counts,
    tokens_at_equal_flops,
    training_flops,
)
from thoughtbubbles.model.budget import MAX_TOKENS, Budget, parse_budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.planning.setup import Job, at_budget, read_job
from thoughtbubbles.recipes.training import SHARDINGS
from thoughtbubbles.support.errors import InputError, shown
from thoughtbubbles.training.memory import USABLE_MEMORY, largest_micro_batch, process_bytes

DEFAULT_MFU = 0.4
# No batch or cluster has more, and no run or device comes near.
MOST_ROWS = 2**20
MOST_AMOUNT = 1e30
# Steps whose budgets are drawn one by one.
MOST_DRAWN = 1_000_000
UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the peak of a training step.

    Attributes:
        weights: float32 masters.
        gradients: float32.
        optimizer: AdamW's two moments, float32.
        casts: bfloat16 copies of the matrices that autocast keeps.
        loss: the unembedding's gradient while the loss forms it, and the logits at work.
        exchange: buffers of the exchange with other devices.
        activations: what autograd saves of a micro-batch, the loss included.
        passing: held beside them for a while, such as a block that is computed again.
        total: the sum.
    """

    weights: int
    gradients: int
    optimizer: int
    casts: int
    loss: int
    exchange: int
    activations: int
    passing: int
    total: int


@dataclass(frozen=True)
class Costs:
    """What one model costs.

    Attributes:
        parameters: by part.
        streams_per_token: that each layer computes.
        forward_flops: of a token.
        training_flops: of a token, forward and backward.
        decoding_flops: of a token generated with a cache that makes the context a whole row.
        cache_bytes: of a token in that cache.
        memory: of training.
        tokens_per_second: in training, all devices together; None without a device.
    """

    parameters: ParameterCounts
    streams_per_token: list[float]
    forward_flops: float
    training_flops: float
    decoding_flops: float
    cache_bytes: float
    memory: Memory
    tokens_per_second: float | None


@dataclass(frozen=True)
class Run:
    """What a whole run of training costs.

    Attributes:
        steps: optimizer steps.
        tokens: seen in them.
        flops: of training, evaluations left out.
        seconds: that they take; None without a device.
        dense_tokens: on which the dense model trains for the same FLOPs.
    """

    steps: int
    tokens: int
    flops: int
    seconds: float | None
    dense_tokens: int


@dataclass(frozen=True)
class Fit:
    """Whether training fits the memory of a device.

    Attributes:
        memory: bytes of the device.
        usable: bytes of them that are counted on.
        fits: whether the plan's own micro-batch does.
        micro_batch_size: rows of the largest that does and divides the device's share of the batch; None if not even
            one row does.
        checkpointed_micro_batch_size: the same with gradient checkpointing.
    """

    memory: float
    usable: float
    fits: bool
    micro_batch_size: int | None
    checkpointed_micro_batch_size: int | None


@dataclass(frozen=True)
class Plan:
    """The report.

    Attributes:
        name: of the preset, recipe or model.
        config: the shape and rules of the model.
        length: tokens a row.
        budget: streams per token.
        precision: of training and of the cache, float32 or bfloat16.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        gpus: devices that train it.
        sharding: how they share its memory, ddp or fsdp; None on one.
        batch_size: rows of an optimizer step, all devices together.
        micro_batch_size: rows of one forward pass on one device.
        model: its costs.
        dense: those of the same shape without forks.
        run: None where nothing says how long to train.
        fit: None without the memory of a device.
        notes: what was assumed, in words.
    """

    name: str
    config: dict[str, Any]
    length: int
    budget: str
    precision: str
    gradient_checkpointing: bool
    gpus: int
    sharding: str | None
    batch_size: int
    micro_batch_size: int
    model: Costs
    dense: Costs
    run: Run | None
    fit: Fit | None
    notes: list[str]


@dataclass(frozen=True)
class _Devices:
    """The GPUs that train together, and how they share memory."""

    gpus: int
    sharding: str

    def notes(self) -> list[str]:
        """What a reader has to know of them."""
        if self.gpus == 1:
            return []
        return ["Times leave out what GPUs wait for each other."]


def make_plan(
    name: str,
    length: int | None = None,
    budget: Budget | None = None,
    batch_size: int | None = None,
    tokens: float | None = None,
    precision: str | None = None,
    device_flops: float | None = None,
    mfu: float | None = None,
    memory: str | None = None,
    gpus: int = 1,
    sharding: str | None = None,
    variant: str | None = None,
) -> Plan:
    """Work out what a model costs.

    Args:
        name: a preset, a recipe's YAML file or the folder of a model.
        length: tokens a row; None is that of the recipe's data, or else the longest of the model.
        budget: None is the model's own, or those of the recipe.
        batch_size: rows a step; None is the recipe's, or 16 for each GPU.
        tokens: to train on, rounded up to whole steps; None is what the recipe's steps come to.
        precision: of training, float32 or bfloat16; None is the recipe's, or bfloat16.
        device_flops: floating-point operations per second of a device at its best.
        mfu: share of them that training reaches; None is 0.4.
        memory: of a device, such as 80GB or 24GiB.
        gpus: devices that train together.
        sharding: how they share weights, gradients and moments: `ddp`, not at all, or `fsdp`; None is the
            recipe's, or ddp.
        variant: of a comparison, where `name` is the recipe of one.

    Raises:
        InputError: naming the value and what was expected.
    """
    _check_number("length", length, MAX_TOKENS)
    for option, value in (("batch_size", batch_size), ("gpus", gpus)):
        _check_number(option, value, MOST_ROWS)
    for option, amount in (("tokens", tokens), ("device_flops", device_flops)):
        _check_number(option, amount, MOST_AMOUNT)
    _check_mfu(mfu, device_flops)
    _check_sharding(sharding, gpus)
    _check_precision(precision)
    available = None if memory is None else parse_bytes(memory)
    job = read_job(name, length, budget, batch_size, precision, gpus, variant)
    devices = _Devices(gpus, sharding or job.sharding)
    if tokens is not None:
        job = replace(job, steps=math.ceil(tokens / (job.batch_size * job.length)))
    rate = None if device_flops is None else gpus * device_flops * (mfu or DEFAULT_MFU)
    config = job.config
    return Plan(
        name=name if variant is None else f"{name}, {variant}",
        config=_describe_config(config),
        length=job.length,
        budget=str(config.exact_budget()),
        precision=job.precision,
        gradient_checkpointing=job.checkpointing,
        gpus=gpus,
        sharding=None if gpus == 1 else devices.sharding,
        batch_size=job.batch_size,
        micro_batch_size=job.micro_batch_size,
        model=_costs(job, devices, rate),
        dense=_costs(replace(job, config=dense_twin(config), budgets=()), devices, rate),
        run=None if job.steps is None else _run(job, job.steps, rate),
        fit=None if available is None else _fit(job, devices, available),
        notes=[*job.notes, *devices.notes()],
    )


def parse_bytes(text: str) -> float:
    """Bytes of an amount of memory such as 80GB (10^9 bytes each) or 24GiB (2^30).

    Raises:
        InputError: if it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    amount = 0.0 if found is None else float(found[1]) * UNITS.get(found[2].upper(), 0)
    if not 0 < amount < math.inf:
        raise InputError(f"memory={shown(text)}: expected an amount such as 80GB or 24GiB")
    return amount


def _check_number(name: str, value: float | None, most: float) -> None:
    if value is not None and not 0 < value <= most:
        raise InputError(f"{name}={shown(value)}: expected more than 0 and at most {most:,}")


def _check_mfu(mfu: float | None, device_flops: float | None) -> None:
    if mfu is not None and not 0 < mfu <= 1:
        raise InputError(f"mfu={mfu}: expected a share of device_flops, more than 0 and at most 1")
    if mfu is not None and device_flops is None:
        raise InputError(f"mfu={mfu}: expected device_flops with it")


def _check_sharding(sharding: str | None, gpus: int) -> None:
    if sharding is not None and sharding not in SHARDINGS:
        raise InputError(f"sharding={sharding!r}: expected one of {', '.join(SHARDINGS)}")
    if sharding is not None and gpus == 1:
        raise InputError(f"sharding={sharding!r}: expected gpus of at least 2 with it")


def _check_precision(precision: str | None) -> None:
    try:
        item_bytes("float32" if precision is None else precision)
    except ValueError as error:
        raise InputError(str(error)) from None


def _describe_config(config: ThoughtbubblesConfig) -> dict[str, Any]:
    names = ("num_hidden_layers", "num_loops", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    rules = ("routing", "attenuation", "merge")
    return {name: getattr(config, name) for name in (*names, *rules)} | {"fork_layers": list(config.gated_layers)}


def _costs(job: Job, devices: _Devices, rate: float | None) -> Costs:
    """Of one model; `rate` is what the devices do together, in floating-point operations per second."""
    config, length = job.config, job.length
    training = training_flops(config, length) / length
    return Costs(
        parameters=parameter_counts(config),
        streams_per_token=[width / length for width in layer_widths(config, length)],
        forward_flops=forward_flops(config, length) / length,
        training_flops=training,
        decoding_flops=decoding_flops(config, length),
        cache_bytes=cache_bytes(config, length, precision=job.precision) / length,
        memory=_memory(job, devices, job.micro_batch_size),
        tokens_per_second=None if rate is None else rate / training,
    )


def _memory(job: Job, devices: _Devices, rows: int) -> Memory:
    """Of training with so many rows in a micro-batch."""
    state = process_bytes(job.config, job.precision, job.checkpointing, devices.gpus, devices.sharding)
    budget = max(map(parse_budget, job.budgets), default=None)
    each = activation_bytes(job.config, job.length, budget, job.precision, job.checkpointing)
    total = state.total + rows * each.total
    return Memory(**asdict(state), activations=rows * each.saved, passing=rows * each.passing, total=total)


def _run(job: Job, steps: int, rate: float | None) -> Run:
    """Of so many steps."""
    dense = dense_twin(job.config)
    flops = dense_tokens = 0
    for budget, count in _steps_by_budget(job, steps).items():
        config, rows = at_budget(job.config, budget), count * job.batch_size
        flops += rows * training_flops(config, job.length)
        dense_tokens += tokens_at_equal_flops(config, dense, job.length, rows * job.length)
    return Run(
        steps=steps,
        tokens=steps * job.batch_size * job.length,
        flops=flops,
        seconds=None if rate is None else flops / rate,
        dense_tokens=dense_tokens,
    )


def _steps_by_budget(job: Job, steps: int) -> dict[Fraction, int]:
    """How many of the steps train at each budget; of very many about as many."""
    if not job.budgets:
        return {job.config.exact_budget(): steps}
    from thoughtbubbles.training.meter import budget_of_step

    counted = min(steps, MOST_DRAWN)
    drawn = Counter(parse_budget(budget_of_step(job.budgets, job.seed, step)) for step in range(1, counted + 1))
    return {budget: round(Fraction(count * steps, counted)) for budget, count in drawn.items()}


def _fit(job: Job, devices: _Devices, memory: float) -> Fit:
    usable = USABLE_MEMORY * memory
    return Fit(
        memory=memory,
        usable=usable,
        fits=_memory(job, devices, job.micro_batch_size).total <= usable,
        micro_batch_size=_largest_micro_batch(replace(job, checkpointing=False), devices, usable),
        checkpointed_micro_batch_size=_largest_micro_batch(replace(job, checkpointing=True), devices, usable),
    )


def _largest_micro_batch(job: Job, devices: _Devices, usable: float) -> int | None:
    """Rows of the largest micro-batch that divides a device's share of the batch and fits."""
    return largest_micro_batch(job.batch_size // devices.gpus, lambda rows: _memory(job, devices, rows).total, usable)
