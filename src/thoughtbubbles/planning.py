"""What a model will cost before it is trained: the report of `thoughtbubbles plan` (Design 5.2).

The numbers of one row or token come from `accounting`; here they become those of a run on a device.
"""

import copy
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thoughtbubbles.accounting import (
    ParameterCounts,
    activation_bytes,
    cache_bytes,
    decoding_flops,
    dense_twin,
    forward_flops,
    item_bytes,
    layer_widths,
    parameter_counts,
    state_bytes,
    tokens_at_equal_flops,
    training_flops,
)
from thoughtbubbles.budget import Budget, parse_budget
from thoughtbubbles.configuration import PRESETS, ThoughtbubblesConfig
from thoughtbubbles.errors import InputError
from thoughtbubbles.loading import load_config

if TYPE_CHECKING:
    from thoughtbubbles.training.recipe import Recipe

DEFAULT_BATCH_SIZE = 16
DEFAULT_MFU = 0.4
USABLE_MEMORY = 0.9
"""Share of a device's memory that a plan fills: libraries and fragmentation take the rest."""
UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the peak of a training step.

    Attributes:
        weights: float32 masters.
        gradients: float32.
        optimizer: AdamW's two moments, float32.
        casts: bfloat16 copies of the matrices that autocast keeps.
        activations: what autograd saves of a micro-batch, the loss included.
        passing: held beside them for a while: the gradients of the logits, or a block that is computed again.
        total: the sum.
    """

    weights: int
    gradients: int
    optimizer: int
    casts: int
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
        tokens_per_second: in training; None without a device.
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
        micro_batch_size: rows of the largest that does and divides the batch; None if not even one row does.
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
        batch_size: rows of an optimizer step.
        micro_batch_size: rows of one forward pass.
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
    batch_size: int
    micro_batch_size: int
    model: Costs
    dense: Costs
    run: Run | None
    fit: Fit | None
    notes: list[str]


@dataclass(frozen=True)
class _Job:
    """A model and how it is to be trained.

    `budgets` are those that steps draw from by `seed`, empty for the model's own.
    """

    config: ThoughtbubblesConfig
    length: int
    batch_size: int
    micro_batch_size: int
    precision: str
    checkpointing: bool
    steps: int | None
    budgets: tuple[Budget, ...] = ()
    seed: int = 0
    notes: tuple[str, ...] = ()


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
) -> Plan:
    """Work out what a model costs.

    Args:
        name: a preset, a recipe's YAML file or the folder of a model.
        length: tokens a row; None is that of the recipe's data, or else the longest of the model.
        budget: None is the model's own, or those of the recipe.
        batch_size: rows a step; None is the recipe's, or 16.
        tokens: to train on, rounded up to whole steps; None is what the recipe's steps come to.
        precision: of training, float32 or bfloat16; None is the recipe's, or bfloat16.
        device_flops: floating-point operations per second of the device at its best.
        mfu: share of them that training reaches; None is 0.4.
        memory: of the device, such as 80GB or 24GiB.

    Raises:
        InputError: naming the value and what was expected.
    """
    _check_above_zero(length=length, batch_size=batch_size, tokens=tokens, device_flops=device_flops)
    _check_mfu(mfu, device_flops)
    _check_precision(precision)
    available = None if memory is None else parse_bytes(memory)
    job = _read_job(name, length, budget, batch_size, precision)
    if tokens is not None:
        job = replace(job, steps=math.ceil(tokens / (job.batch_size * job.length)))
    rate = None if device_flops is None else device_flops * (mfu or DEFAULT_MFU)
    config = job.config
    return Plan(
        name=name,
        config=_describe_config(config),
        length=job.length,
        budget=str(config.exact_budget()),
        precision=job.precision,
        gradient_checkpointing=job.checkpointing,
        batch_size=job.batch_size,
        micro_batch_size=job.micro_batch_size,
        model=_costs(job, rate),
        dense=_costs(replace(job, config=dense_twin(config), budgets=()), rate),
        run=None if job.steps is None else _run(job, job.steps, rate),
        fit=None if available is None else _fit(job, available),
        notes=list(job.notes),
    )


def parse_bytes(text: str) -> float:
    """Bytes of an amount of memory such as 80GB (10^9 bytes each) or 24GiB (2^30).

    Raises:
        InputError: if it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if found is None or found[2].upper() not in UNITS or not float(found[1]) > 0:
        raise InputError(f"memory={text!r}: expected an amount such as 80GB or 24GiB")
    return float(found[1]) * UNITS[found[2].upper()]


def _check_above_zero(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"{name}={value}: expected more than 0")


def _check_mfu(mfu: float | None, device_flops: float | None) -> None:
    if mfu is not None and not 0 < mfu <= 1:
        raise InputError(f"mfu={mfu}: expected a share of device_flops, more than 0 and at most 1")
    if mfu is not None and device_flops is None:
        raise InputError(f"mfu={mfu}: expected device_flops with it")


def _check_precision(precision: str | None) -> None:
    try:
        item_bytes("float32" if precision is None else precision)
    except ValueError as error:
        raise InputError(str(error)) from None


def _read_job(
    name: str, length: int | None, budget: Budget | None, batch_size: int | None, precision: str | None
) -> _Job:
    """What a name stands for, changed as the options say."""
    if name in PRESETS:
        # A preset is no trained model: its longest row is no limit.
        longest = {} if length is None else {"max_position_embeddings": length}
        job = _job_of_model(ThoughtbubblesConfig.preset(name, **longest), batch_size)
    elif Path(name).suffix in (".yaml", ".yml"):
        job = _job_of_recipe(name, batch_size)
    elif Path(name).is_dir():
        job = _job_of_model(load_config(name), batch_size)
    else:
        raise InputError(
            f"config {name!r}: expected a preset ({', '.join(PRESETS)}), a recipe (.yaml) or the folder of a model"
        )
    if length is not None:
        job = replace(job, length=length)
    if job.length > job.config.max_position_embeddings:
        most = job.config.max_position_embeddings
        raise InputError(f"length={job.length}: expected at most {most}, the model's max_position_embeddings")
    if budget is not None:
        job = replace(job, config=_at_budget(job.config, budget), budgets=())
    return job if precision is None else replace(job, precision=precision)


def _job_of_model(config: ThoughtbubblesConfig, batch_size: int | None) -> _Job:
    rows = batch_size or DEFAULT_BATCH_SIZE
    return _Job(config, config.max_position_embeddings, rows, rows, "bfloat16", checkpointing=False, steps=None)


def _job_of_recipe(name: str, batch_size: int | None) -> _Job:
    from thoughtbubbles.training.recipe import load_recipe, model_config
    from thoughtbubbles.training.rundata import check_batch

    recipe = load_recipe(name, () if batch_size is None else [f"training.batch_size={batch_size}"])
    settings = recipe.training
    micro_batch_size, _ = check_batch(recipe, processes=1)
    found, longest, notes = _read_data(recipe)
    config = model_config(recipe, found, longest)
    if settings.precision == "auto":
        notes = (*notes, "Precision auto is taken for bfloat16, as on GPUs that have it.")
    if settings.training_budgets is not None:
        budgets = ", ".join(map(str, settings.training_budgets))
        notes = (*notes, f"Steps draw their budget from {budgets}: the run is theirs, memory that of the largest.")
    return _Job(
        config=config,
        length=min(longest or config.max_position_embeddings, config.max_position_embeddings),
        batch_size=settings.batch_size,
        micro_batch_size=micro_batch_size,
        precision="bfloat16" if settings.precision == "auto" else settings.precision,
        checkpointing=settings.gradient_checkpointing,
        steps=settings.steps,
        budgets=tuple(settings.training_budgets or ()),
        seed=settings.seed,
        notes=notes,
    )


def _read_data(recipe: "Recipe") -> tuple[dict[str, Any], int | None, tuple[str, ...]]:
    """Fields of the model that a recipe's data gives, its longest row in tokens, and what had to be assumed."""
    from thoughtbubbles.data.manifest import Manifest
    from thoughtbubbles.training.recipe import FineTuningSection

    data = recipe.data
    if isinstance(data, FineTuningSection):
        return {}, data.max_length, ("Every row is taken for as long as the longest: shorter ones cost less.",)
    folder = Path(data.path or next(iter(data.mixture or {}))).expanduser()
    if folder.is_dir():
        manifest = Manifest.read(folder)
        return {"vocab_size": manifest.vocab_size}, manifest.block_size, ()
    vocabulary = (
        "" if {"vocab_size", "pretrained"} & set(recipe.model) else " and its vocabulary, which data may change"
    )
    return {}, None, (f"{folder} is not prepared yet: rows are the model's longest{vocabulary}.",)


def _at_budget(config: ThoughtbubblesConfig, budget: Budget) -> ThoughtbubblesConfig:
    """The same model at another budget."""
    try:
        exact = parse_budget(budget)
    except ValueError as error:
        raise InputError(str(error)) from None
    changed = copy.deepcopy(config)
    changed.budget = str(exact)
    return changed


def _describe_config(config: ThoughtbubblesConfig) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    rules = ("routing", "attenuation", "merge")
    return {name: getattr(config, name) for name in (*names, *rules)} | {"fork_layers": list(config.gated_layers)}


def _costs(job: _Job, rate: float | None) -> Costs:
    """Of one model; `rate` is what the device does, in floating-point operations per second."""
    config, length = job.config, job.length
    training = training_flops(config, length) / length
    return Costs(
        parameters=parameter_counts(config),
        streams_per_token=[width / length for width in layer_widths(config, length)],
        forward_flops=forward_flops(config, length) / length,
        training_flops=training,
        decoding_flops=decoding_flops(config, length),
        cache_bytes=cache_bytes(config, length, precision=job.precision) / length,
        memory=_memory(job, job.micro_batch_size),
        tokens_per_second=None if rate is None else rate / training,
    )


def _memory(job: _Job, rows: int) -> Memory:
    """Of training with so many rows in a micro-batch."""
    state = state_bytes(job.config, job.precision, job.checkpointing)
    budget = max(map(parse_budget, job.budgets), default=None)
    each = activation_bytes(job.config, job.length, budget, job.precision, job.checkpointing)
    total = state.total + rows * each.total
    return Memory(**asdict(state), activations=rows * each.saved, passing=rows * each.passing, total=total)


def _run(job: _Job, steps: int, rate: float | None) -> Run:
    """Of so many steps."""
    dense = dense_twin(job.config)
    flops = dense_tokens = 0
    for budget, count in _steps_by_budget(job, steps).items():
        config, rows = _at_budget(job.config, budget), count * job.batch_size
        flops += rows * training_flops(config, job.length)
        dense_tokens += tokens_at_equal_flops(config, dense, job.length, rows * job.length)
    return Run(
        steps=steps,
        tokens=steps * job.batch_size * job.length,
        flops=flops,
        seconds=None if rate is None else flops / rate,
        dense_tokens=dense_tokens,
    )


def _steps_by_budget(job: _Job, steps: int) -> dict[Fraction, int]:
    """How many of the steps train at each budget."""
    if not job.budgets:
        return {job.config.exact_budget(): steps}
    from thoughtbubbles.training.meter import budget_of_step

    drawn = (parse_budget(budget_of_step(job.budgets, job.seed, step)) for step in range(1, steps + 1))
    return Counter(drawn)


def _fit(job: _Job, memory: float) -> Fit:
    usable = USABLE_MEMORY * memory
    return Fit(
        memory=memory,
        usable=usable,
        fits=_memory(job, job.micro_batch_size).total <= usable,
        micro_batch_size=_largest_micro_batch(replace(job, checkpointing=False), usable),
        checkpointed_micro_batch_size=_largest_micro_batch(replace(job, checkpointing=True), usable),
    )


def _largest_micro_batch(job: _Job, usable: float) -> int | None:
    """Rows of the largest micro-batch that divides the batch and fits."""
    divisors = (rows for rows in range(job.batch_size, 0, -1) if job.batch_size % rows == 0)
    return next((rows for rows in divisors if _memory(job, rows).total <= usable), None)
