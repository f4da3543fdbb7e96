"""Small builders and the comparison with the reference, shared by the tests of the core."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor, nn

from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.gate import ForkGate
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.model.reference import ReferenceFork, reference_forward, route
from thoughtbubbles.model.streams import Streams
from thoughtbubbles.model.threshold import ScoreHistogram

SHARED = Path(__file__).resolve().parents[2] / "shared"
VOCAB = 19
MARGIN = 1e-5  # two scores closer than this may lie on either side of a line of the routers' grid
FLOAT32_FLOOR = 2**-22 / 1e-3  # an error of 1e-3 of such a gradient is two roundings of the largest gradient
Case = dict[str, Any]
of_whole_models = settings(max_examples=settings.default.max_examples // 2)
"""Fewer examples of a property than others have: each is a model's work."""


def tiny_config(**overrides: Any) -> ThoughtbubblesConfig:
    """Four layers of 16 channels, forks before the second and third."""
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 512,
        "fork_layers": [1, 2],
    }
    return ThoughtbubblesConfig(**{**shape, **overrides})


def routed(name: str) -> Case:
    """Fields of the configuration for a routing; `random-topk` is `random` by the rule `topk`."""
    routing, _, rule = name.partition("-")
    return {"routing": routing, **({"random_rule": rule} if rule else {})}


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights far from initialisation: gates that differ, gains that are not 1, biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_gain = "norm" in name and name.endswith("weight")
        scale = 0.5 if "embed" in name or "lm_head" in name else 0.3
        parameter.data.copy_(1 + 0.2 * noise if is_gain else scale * noise)
    set_thresholds(module)


def set_thresholds(module: nn.Module) -> None:
    """Thresholds as if scores were spread evenly over three nats, where routing is `threshold`."""
    for histogram in histograms(module):
        histogram.reached.copy_((torch.arange(1, len(histogram.reached) + 1) / (3 * 64)).clamp(max=1))
        histogram.updates.fill_(1)


def histograms(module: nn.Module) -> list[ScoreHistogram]:
    """Those of a model whose routing is `threshold`, in the order of its fork layers."""
    return [part for part in module.modules() if isinstance(part, ScoreHistogram)]


def random_model(config: ThoughtbubblesConfig, seed: int = 0) -> ThoughtbubblesForCausalLM:
    """A model in evaluation mode with `randomise`d weights."""
    model = ThoughtbubblesForCausalLM(config)
    randomise(model, seed)
    model.eval()
    return model


def tiny_model(seed: int = 0, **overrides: Any) -> ThoughtbubblesForCausalLM:
    """`random_model` of a `tiny_config`."""
    return random_model(tiny_config(**overrides), seed)


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """[rows, length] token ids."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def padding_mask(kind: str, rows: int, length: int) -> Tensor | None:
    """[rows, length] with another amount of padding in each row, at least one real token in all."""
    if kind == "none":
        return None
    amounts = [min(row * max(length // 3, 1), length - 1) for row in range(rows)]
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row, amount in enumerate(amounts):
        if kind == "holes":
            order = torch.randperm(length, generator=torch.Generator().manual_seed(row + 7 * length))
            mask[row, order[:amount]] = 0
        elif amount:
            mask[row, slice(0, amount) if kind == "left" else slice(-amount, None)] = 0
    return mask


def put_at(values: Tensor, columns: Sequence[int], length: int, filler: int = 0) -> tuple[Tensor, Tensor]:
    """One row of token ids [n] at the given columns of a padded row: (ids [1, length], mask [1, length])."""
    ids = torch.full((1, length), filler)
    mask = torch.zeros(1, length, dtype=torch.int64)
    ids[0, list(columns)] = values
    mask[0, list(columns)] = 1
    return ids, mask


def survivors_of(streams: Sequence[Streams], layers: Sequence[int]) -> list[dict[int, list[int]]]:
    """For each row and fork layer the candidates that survived."""
    rows = range(len(streams[0].token))
    origins = {layer: streams[layer].origin for layer in layers}
    return [
        {layer: [c for c in origin[row].tolist() if c >= 0] for layer, origin in origins.items() if origin is not None}
        for row in rows
    ]


@contextmanager
def recorded_scores(model: ThoughtbubblesForCausalLM) -> Iterator[dict[int, list[list[float]]]]:
    """The candidate scores [row][candidate] that each gate sees while the context lasts, by fork layer."""
    scores: dict[int, list[list[float]]] = {}

    def record(layer: int, gate: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(gate, ForkGate)
        streams: Streams = arguments[0]
        candidates = gate.candidate_scores(streams).tolist()
        alive = streams.alive.sum(1).tolist()
        scores[layer] = [row[: 2 * count] for row, count in zip(candidates, alive, strict=True)]

    gates = model.model.gates.items()
    hooks = [gate.register_forward_pre_hook(partial(record, int(layer))) for layer, gate in gates]
    yield scores
    for hook in hooks:
        hook.remove()


def admission_rule(config: ThoughtbubblesConfig) -> str:
    """The reference's name of the rule by which gates choose."""
    return config.random_rule if config.routing == "random" else config.routing


def count_flips(fork: ReferenceFork, scores: list[float], rule: str, budget: Fraction) -> int:
    """How many survivors of a fast path are not those that the reference chooses by its own scores (method: Near ties).

    The fast path must have chosen what the reference's router makes of the fast path's `scores`, and those may
    be off by half the margin: then they decide otherwise only where the reference's margin is below it. Hashes are
    the same everywhere, and what they decide too.
    """

    def choose(scores: list[float]) -> list[int]:
        survive = route(rule, scores, fork.candidate_tokens, fork.optional, budget, fork.threshold)
        return [c for c, survives in enumerate(survive) if survives]

    expected = fork.candidate_scores.tolist()
    assert all(abs(a - b) < MARGIN / 2 for a, b in zip(scores, expected, strict=True))
    drawn = fork.rivals != expected
    assert choose(fork.rivals if drawn else scores) == fork.survivors
    if drawn:
        return 0
    return len(set(choose(expected)) ^ set(fork.survivors))


@dataclass(frozen=True)
class Agreement:
    """How far a model is from the reference, survivors being equal."""

    logits: float
    loss: float
    gradients: dict[str, float]
    flips: int


def compare_with_reference(
    model: ThoughtbubblesForCausalLM, ids: Tensor, mask: Tensor | None = None, budget: Budget | None = None
) -> Agreement:
    """Forward and backward of the model and of the reference with the model's survivors.

    Survivors are compared by themselves, by `count_flips`. Gradients are those of a random weighting of all real
    logits, plus the loss where there is one (and not for float64: transformers computes the loss in float32).
    """
    config = model.config
    labels = ids.masked_fill(torch.arange(ids.shape[1]) % 5 == 3, -100)
    with recorded_scores(model) as scores:
        out = model(ids, attention_mask=mask, labels=labels, budget=budget, output_streams=True)
    survivors = survivors_of(out.streams, config.gated_layers)
    parameters = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    state = {name: buffer.double() for name, buffer in model.named_buffers()} | parameters
    step = int(model.model.routing_step) if model.training else 0
    expected = reference_forward(config, state, ids, mask, labels, budget, survivors, step)
    kappa = config.exact_budget(budget)
    flips = sum(
        count_flips(fork, scores[layer][row], admission_rule(config), kappa)
        for row, forks in enumerate(expected.forks)
        for layer, fork in forks.items()
    )
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert expected.loss is not None
    exact = out.logits.dtype == torch.float64
    with_loss = not exact and not bool(out.loss.isnan())  # rows of one token have no targets
    for result in (out, expected):
        weights = torch.randn((*ids.shape, VOCAB), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        objective = (result.logits * weights.to(result.logits.dtype))[real].mean()
        (objective + result.loss if with_loss else objective).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return Agreement(
        logits=(out.logits - expected.logits)[real].abs().max().item(),
        loss=(out.loss - expected.loss).nan_to_num().abs().item(),
        gradients=relative_errors(
            gradients, {name: p.grad for name, p in parameters.items()}, 1e-9 if exact else FLOAT32_FLOOR
        ),
        flips=flips,
    )


def relative_errors(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], floor: float = FLOAT32_FLOOR
) -> dict[str, float]:
    """||actual - expected|| / ||expected|| by name; a missing gradient is zero.

    Some gradients vanish by cancellation, such as of a gate whose p a LayerNorm divides out, and rounding is all
    that is left of them: those below `floor` times the largest are taken relative to that.
    """
    norms = {name: 0.0 if e is None else e.norm().item() for name, e in expected.items()}
    smallest = floor * max(norms.values())
    errors = {}
    for name, reference in expected.items():
        value = actual[name]
        difference = (torch.zeros(()) if value is None else value).double() - (0 if reference is None else reference)
        errors[name] = difference.norm().item() / max(norms[name], smallest)
    return errors


def all_pairs(factors: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Cases in which any two values of any two factors meet; greedy, deterministic."""
    chooser = random.Random(0)
    missing = {pair for a, b in itertools.combinations(factors, 2) for pair in _pairs_between(factors, a, b)}
    cases = []
    while missing:
        chosen = dict(max(missing))
        for name in [n for n in factors if n not in chosen]:
            gains = [sum(p in missing for p in _pairs(chosen, name, k)) for k in range(len(factors[name]))]
            chosen[name] = chooser.choice([k for k, gain in enumerate(gains) if gain == max(gains)])
        missing -= set(itertools.combinations(sorted(chosen.items()), 2))
        cases.append({name: values[chosen[name]] for name, values in factors.items()})
    return cases


_Pair = tuple[tuple[str, int], tuple[str, int]]


def _pairs_between(factors: Mapping[str, Sequence[Any]], a: str, b: str) -> Iterator[_Pair]:
    a, b = sorted((a, b))
    for i, j in itertools.product(range(len(factors[a])), range(len(factors[b]))):
        yield (a, i), (b, j)


def _pairs(chosen: Mapping[str, int], name: str, value: int) -> Iterator[_Pair]:
    for other in chosen.items():
        first, second = sorted((other, (name, value)))
        yield first, second


def case_id(case: Case) -> str:
    """A readable test id."""
    return "-".join(str(value) for value in case.values())


LLAMA3: Case = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: list[Case] = [
    {"rope_type": "linear", "factor": 2.0},
    {**LLAMA3, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 20.0, "truncate": False},
]
"""Rotary embeddings whose frequencies are scaled."""

LLAMA: Case = {
    "norm": "rmsnorm",
    "mlp": "gated",
    "hidden_act": "silu",
    "use_bias": False,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "qk_norm": True,
}
NEOX: Case = {"parallel_residual": True, "partial_rotary_factor": 0.25, "attention_bias": False}
OTHER_BLOCKS = [LLAMA, NEOX, {**LLAMA, "parallel_residual": True, "rope_parameters": ROPES[2]}]
"""Blocks that differ from the paper's in all that counts."""

# What differs from a `causal` model of the defaults, and yet no logit depends on a later token.
LEFT_TO_RIGHT: list[Case] = [
    {"routing": "threshold", "budget": 1.5},
    {"routing": "threshold", "budget": 3.25},
    {"routing": "random", "budget": 1.5, "routing_seed": 4},
    {"routing": "random", "budget": 3.25},
    {"routing": "uniform", "budget": 1.2},
    {"routing": "uniform", "budget": 2},
    {"routing": "copy", "budget": 3},
    {"routing": "copy", "budget": 2, "copy_layer": 2},
    {"routing": "pause", "budget": 3},
    {"routing": "causal", "budget": 1.5, "fork_content": "attended"},
    {"routing": "threshold", "budget": 3.25, "fork_content": "attended"},
]
