"""A plan as tables for people."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from rich.console import Console
from rich.table import Table

from thoughtbubbles.planning.plan import Costs, Fit, Plan, RunCosts
from thoughtbubbles.support.tables import console_table

CostLine = tuple[str, Callable[[Costs], float]]


def show_plan(plan: Plan) -> None:
    """Print a plan on standard output."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(title(plan), markup=False)
    console.print(costs_table(plan))
    for line in closing_lines(plan):
        console.print(line, markup=False)


def title(plan: Plan) -> str:
    """The model and what is planned, in words."""
    config = plan.config
    rules = "dense" if plan.config["routing"] == "none" else f"{config['routing']} routing, budget {plan.budget}"
    if config["num_loops"] > 1:
        rules += f", blocks applied {config['num_loops']} times"
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    sharing = "" if groups == heads else f" ({groups} of keys and values)"
    return (
        f"{plan.name}: {config['num_hidden_layers']} layers x {config['hidden_size']}, "
        f"{heads} heads{sharing}, vocabulary {config['vocab_size']:,}; {rules}; "
        f"rows of {plan.length:,} tokens{_devices(plan)}"
    )


def _devices(plan: Plan) -> str:
    """How many GPUs there are and how they share, where they are several."""
    return "" if plan.sharding is None else f"; {plan.gpus:,} GPUs, {plan.sharding.upper()}"


def costs_table(plan: Plan) -> Table:
    """The costs of the model beside those of the dense one."""
    dense = plan.config["routing"] == "none" and plan.config["num_loops"] == 1
    columns = ("", "this model", "dense", "ratio")[: 2 if dense else 4]
    sections = [
        (section, [(f"  {name}", *cells)[: len(columns)] for name, *cells in _cells(plan, form, rows)])
        for section, form, rows in _sections(plan)
    ]
    return console_table(columns, sections, box=None, pad_edge=False, show_header=not dense, header_style="bold")


def _cells(plan: Plan, form: Callable[[float], str], rows: Iterable[CostLine]) -> Iterator[tuple[str, str, str, str]]:
    """Of each row that is not 0: its name, the model's cost, the dense one's, and their ratio."""
    for name, cost in rows:
        ours, theirs = cost(plan.model), cost(plan.dense)
        if ours or theirs:
            yield name, form(ours), form(theirs) if theirs else "-", f"{ours / theirs:.2f}" if theirs else ""


def _sections(plan: Plan) -> Iterator[tuple[str, Callable[[float], str], list[CostLine]]]:
    yield (
        "Parameters",
        _metric,
        [
            ("embedding", lambda costs: costs.parameters.embedding),
            ("blocks", lambda costs: costs.parameters.blocks),
            ("gates", lambda costs: costs.parameters.gates),
            ("all", lambda costs: costs.parameters.total),
        ],
    )
    yield "Streams a token", lambda value: f"{value:.2f}", list(_layer_rows(plan))
    yield (
        "Operations (FLOPs) a token",
        _metric,
        [
            (f"forward, or generating after {plan.length - 1:,} tokens", lambda costs: costs.forward_flops),
            ("training, forward and backward", lambda costs: costs.training_flops),
        ],
    )
    yield (
        f"Cache when generating, {plan.precision}",
        _bytes,
        [
            ("a token", lambda costs: costs.cache_bytes),
            (f"a row of {plan.length:,} tokens", lambda costs: costs.cache_bytes * plan.length),
        ],
    )
    each = "" if plan.sharding is None else " on each GPU"
    checkpointing = ", gradient checkpointing" if plan.gradient_checkpointing else ""
    yield (
        f"Memory of training{each}, {plan.precision}, {_rows(plan.micro_batch_size)} at a time{checkpointing}",
        _bytes,
        [
            ("weights (float32)", lambda costs: costs.memory.weights),
            ("gradients", lambda costs: costs.memory.gradients),
            ("AdamW's moments", lambda costs: costs.memory.optimizer),
            ("bfloat16 copies of the matrices", lambda costs: costs.memory.casts),
            ("the loss and its gradient", lambda costs: costs.memory.loss),
            ("buffers of the exchange", lambda costs: costs.memory.exchange),
            ("activations kept for the backward pass", lambda costs: costs.memory.activations),
            ("more at the peak", lambda costs: costs.memory.passing),
            ("all", lambda costs: costs.memory.total),
        ],
    )
    if plan.model.tokens_per_second is not None:
        yield "Speed of training", _metric, [("tokens a second", lambda costs: costs.tokens_per_second or 0.0)]


def _layer_rows(plan: Plan) -> Iterator[CostLine]:
    """A row for each run of layers that are equally wide."""
    for _, run in groupby(range(len(plan.model.streams_per_token)), key=plan.model.streams_per_token.__getitem__):
        layers = list(run)
        span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        yield span, _streams_of(layers[0])


def _streams_of(layer: int) -> Callable[[Costs], float]:
    return lambda costs: costs.streams_per_token[layer]


def closing_lines(plan: Plan) -> Iterator[str]:
    """The run, whether it fits, and what was assumed."""
    if plan.run is not None:
        yield ""
        yield from _run_lines(plan, plan.run)
    if plan.fit is not None:
        yield ""
        yield from _fit_lines(plan, plan.fit)
    if plan.notes:
        yield ""
        yield from plan.notes


def _run_lines(plan: Plan, run: RunCosts) -> Iterator[str]:
    several = "" if plan.sharding is None else f" on {plan.gpus:,} GPUs"
    time = "" if run.seconds is None else f", {_duration(run.seconds)}{several}"
    yield (
        f"Run: {run.steps:,} steps of {_rows(plan.batch_size)}, {run.tokens:,} tokens, "
        f"{run.flops:.3g} FLOPs of training{time}."
    )
    if run.dense_tokens != run.tokens:
        yield f"The dense model trains on {run.dense_tokens:,} tokens for the same FLOPs."


def _fit_lines(plan: Plan, fit: Fit) -> Iterator[str]:
    verdict = "fits" if fit.fits else "does not fit"
    yield (
        f"{_bytes(fit.memory)}: a micro-batch of {_rows(plan.micro_batch_size)} {verdict} into the "
        f"{_bytes(fit.usable)} that libraries and fragmentation leave of it."
    )
    plain, checkpointed = (
        "not even one row" if rows is None else _rows(rows)
        for rows in (fit.micro_batch_size, fit.checkpointed_micro_batch_size)
    )
    share = "" if plan.sharding is None else f", {_rows(plan.batch_size // plan.gpus)} a GPU,"
    yield (
        f"The largest micro-batch of a batch of {_rows(plan.batch_size)}{share} that fits: {plain}; "
        f"with gradient checkpointing: {checkpointed}."
    )


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _metric(value: float) -> str:
    """Three digits and a letter: K, M, G, T, P, E."""
    number, unit = _scaled(value)
    return number + unit


def _bytes(value: float) -> str:
    number, unit = _scaled(value)
    return f"{number} {unit}B"


def _scaled(value: float) -> tuple[str, str]:
    """Three digits of a number, and the letter of the power of 1000 to multiply them by."""
    units = ("", "K", "M", "G", "T", "P", "E")
    place = 0
    while value >= 999.5 and place < len(units) - 1:
        value /= 1000
        place += 1
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}", units[place]


def _duration(seconds: float) -> str:
    """In the unit that gives a number one can imagine."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
