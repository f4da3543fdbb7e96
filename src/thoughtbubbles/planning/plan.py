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
    SHARDINGS,
    USABLE_MEMORY,
    ParameterCounts,
    activation_bytes,
    cache_bytes,
    decoding_flops,
    dense_twin,
    forward_flops,
    item_bytes,
    largest_micro_batch,
    layer_widths,
    parameter_counts,
    process_bytes,
    tokens_at_equal_flops,
    training_flops,
)
from thoughtbubbles.model.budget import MAX_TOKENS, parse_budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.planning.setup import Setup, at_budget, read_setup
from thoughtbubbles.recipes.options import PlanOptions
from thoughtbubbles.support.errors import InputError, shown

__all__ = ["make_plan"]

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
class RunCosts:
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
    run: RunCosts | None
    fit: Fit | None
    notes: list[str]


def make_plan(name: str, **options: Any) -> Plan:
    """Work out what a model costs.

    Args:
        name: a preset, a recipe's YAML file or the folder of a model.
        options: fields of `PlanOptions`.

    Raises:
        InputError: naming the value and what was expected.
    """
    asked = PlanOptions(**options)
    _check_options(asked)
    available = None if asked.memory is None else parse_bytes(asked.memory)
    rate = None if asked.device_flops is None else asked.gpus * asked.device_flops * (asked.mfu or DEFAULT_MFU)
    setup = read_setup(name, asked)
    config = setup.config
    return Plan(
        name=name if asked.variant is None else f"{name}, {asked.variant}",
        config=_describe_config(config),
        length=setup.length,
        budget=str(config.exact_budget()),
        precision=setup.precision,
        gradient_checkpointing=setup.checkpointing,
        gpus=setup.gpus,
        sharding=None if setup.gpus == 1 else setup.sharding,
        batch_size=setup.batch_size,
        micro_batch_size=setup.micro_batch_size,
        model=_costs(setup, rate),
        dense=_costs(replace(setup, config=dense_twin(config), budgets=()), rate),
        run=None if setup.steps is None else _run_costs(setup, setup.steps, rate),
        fit=None if available is None else _fit(setup, available),
        notes=list(setup.notes),
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


def _check_options(options: PlanOptions) -> None:
    limits = {"length": MAX_TOKENS, "batch_size": MOST_ROWS, "gpus": MOST_ROWS}
    for name, most in {**limits, "tokens": MOST_AMOUNT, "device_flops": MOST_AMOUNT}.items():
        value = getattr(options, name)
        if value is not None and not 0 < value <= most:
            raise InputError(f"{name}={shown(value)}: expected more than 0 and at most {most:,}")
    _check_mfu(options.mfu, options.device_flops)
    _check_sharding(options.sharding, options.gpus)
    _check_precision(options.precision)


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
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
    names = ("num_hidden_layers", "num_loops", "hidden_size", *heads, "intermediate_size", "mlp", "norm", "vocab_size")
    rules = ("routing", "attenuation", "merge")
    return {name: getattr(config, name) for name in (*names, *rules)} | {"fork_layers": list(config.gated_layers)}


def _costs(setup: Setup, rate: float | None) -> Costs:
    """Of one model; `rate` is what the devices do together, in floating-point operations per second."""
    config, length = setup.config, setup.length
    training = training_flops(config, length) / length
    return Costs(
        parameters=parameter_counts(config),
        streams_per_token=[width / length for width in layer_widths(config, length)],
        forward_flops=forward_flops(config, length) / length,
        training_flops=training,
        decoding_flops=decoding_flops(config, length),
        cache_bytes=cache_bytes(config, length, precision=setup.precision) / length,
        memory=_memory(setup, setup.micro_batch_size),
        tokens_per_second=None if rate is None else rate / training,
    )


def _memory(setup: Setup, rows: int) -> Memory:
    """Of training with so many rows in a micro-batch."""
    state = process_bytes(setup.config, setup.precision, setup.checkpointing, setup.gpus, setup.sharding)
    budget = max(map(parse_budget, setup.budgets), default=None)
    each = activation_bytes(setup.config, setup.length, budget, setup.precision, setup.checkpointing)
    total = state.total + rows * each.total
    return Memory(**asdict(state), activations=rows * each.saved, passing=rows * each.passing, total=total)


def _run_costs(setup: Setup, steps: int, rate: float | None) -> RunCosts:
    """Of so many steps."""
    dense = dense_twin(setup.config)
    flops = dense_tokens = 0
    for budget, count in _steps_by_budget(setup, steps).items():
        config, rows = at_budget(setup.config, budget), count * setup.batch_size
        flops += rows * training_flops(config, setup.length)
        dense_tokens += tokens_at_equal_flops(config, dense, setup.length, rows * setup.length)
    return RunCosts(
        steps=steps,
        tokens=steps * setup.batch_size * setup.length,
        flops=flops,
        seconds=None if rate is None else flops / rate,
        dense_tokens=dense_tokens,
    )


def _steps_by_budget(setup: Setup, steps: int) -> dict[Fraction, int]:
    """How many of the steps train at each budget; of very many about as many."""
    from thoughtbubbles.training.meter import RUNGS, budget_of_step, rising_budgets

    if not setup.budgets:
        own, each = setup.config.exact_budget(), round(setup.ramp * steps / RUNGS)
        rising = dict.fromkeys(rising_budgets(setup.config.budget), each) if each else {}
        return {**rising, own: steps - sum(rising.values())}

    counted = min(steps, MOST_DRAWN)
    drawn = Counter(parse_budget(budget_of_step(setup.budgets, setup.seed, step)) for step in range(1, counted + 1))
    return {budget: round(Fraction(count * steps, counted)) for budget, count in drawn.items()}


def _fit(setup: Setup, memory: float) -> Fit:
    usable = USABLE_MEMORY * memory
    return Fit(
        memory=memory,
        usable=usable,
        fits=_memory(setup, setup.micro_batch_size).total <= usable,
        micro_batch_size=_largest_micro_batch(replace(setup, checkpointing=False), usable),
        checkpointed_micro_batch_size=_largest_micro_batch(replace(setup, checkpointing=True), usable),
    )


def _largest_micro_batch(setup: Setup, usable: float) -> int | None:
    """Rows of the largest micro-batch that divides a device's share of the batch and fits."""
    return largest_micro_batch(setup.batch_size // setup.gpus, lambda rows: _memory(setup, rows).total, usable)
