"""The parts of a training step by themselves, forward and backward, on inputs of the shapes that they have in it."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.model.attention import rotary_angles
from thoughtbubbles.model.gate import ForkGate, pack_left
from thoughtbubbles.model.loss import chunked_next_token_loss, next_token_targets
from thoughtbubbles.model.rotary import Rotary
from thoughtbubbles.model.routing import Candidates
from thoughtbubbles.model.streams import Streams

ROUNDS = 3
OURS = ("gate", "routing", "gather", "merge")
"""What the dense model has not."""

Work = Callable[[], Tensor | tuple[Tensor, ...] | None]


def part_seconds(
    model: ThoughtbubblesForCausalLM,
    batch: int,
    length: int,
    autocast: AbstractContextManager[Any],
    now: Callable[[], float],
) -> dict[str, float]:
    """Seconds of each part in a step of so many rows of so many tokens, the layers added up.

    Args:
        autocast: entered for each forward.
        now: the time when the device has done its work.
    """
    found: dict[str, float] = {}
    for name, work in _works(model, batch, length):
        times = [_time(work, autocast, now) for _ in range(ROUNDS + 1)][1:]
        found[name] = found.get(name, 0.0) + statistics.median(times)
    model.zero_grad()
    return found


def _time(work: Work, autocast: AbstractContextManager[Any], now: Callable[[], float]) -> float:
    start = now()
    with autocast:
        out = work()
    made = [each for each in (out if isinstance(out, tuple) else (out,)) if each is not None and each.requires_grad]
    middle = now()
    # Gradients of the type and size that they have in the step.
    gradients = [torch.ones_like(each) for each in made]
    ready = now()
    if made:
        torch.autograd.backward(made, gradients)
    return middle - start + now() - ready


def _works(model: ThoughtbubblesForCausalLM, batch: int, length: int) -> Iterator[tuple[str, Work]]:
    body, config = model.model, model.config
    kappa = config.exact_budget()
    ids = torch.randint(config.vocab_size, (batch, length), device=model.device)
    yield "embedding", lambda: body.embed_tokens(ids)
    with torch.no_grad():
        trail = body(ids, output_streams=True).streams
    before = Streams.from_embeddings(trail[0].residual)
    for index, (block, streams) in enumerate(zip(body.layers, trail, strict=False)):
        if index in config.gated_layers:
            yield from _gate_works(body.gates[str(index)], _leaf(before), kappa)
        angles = rotary_angles(streams.positions(), body.rotary)
        if index == 0 or index in config.gated_layers:
            name = "gather" if index in config.gated_layers else "embedding"
            yield name, _positions(streams, body.rotary)
        yield from _block_works(block, _leaf(streams), angles, body._attenuation(streams, index))
        before = trail[index + 1]
    yield "merge", _merge(model, _leaf(before), bool(config.gated_layers))
    hidden, targets = _like(before.residual[:, :length]), next_token_targets(ids, None)
    yield "loss", lambda: chunked_next_token_loss(body.norm(hidden), model.lm_head.weight, targets)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = parameter.detach()
        optimizer.step()

    yield "optimizer", step


def _gate_works(gate: ForkGate, streams: Streams, kappa: Any) -> Iterator[tuple[str, Work]]:
    yield "gate", lambda: gate.candidate_scores(streams)
    scores = gate.candidate_scores(streams).detach().requires_grad_()
    token, alive = (each.repeat_interleave(2, dim=1) for each in (streams.token, streams.alive))
    width = gate.config.rule.width_after(streams.token.shape[1], streams.num_tokens, kappa)

    def route() -> Tensor:
        optional = torch.stack([streams.alive, streams.alive & ~streams.is_root], dim=2).flatten(1)
        return gate.router.whole(Candidates(scores.detach(), token, optional, alive, kappa))

    yield "routing", route
    survive = route()

    def gather() -> tuple[Tensor, Tensor]:
        chosen = gate.select(streams, scores, *pack_left(survive, width))
        return chosen.residual, chosen.log_score

    yield "gather", gather


def _positions(streams: Streams, rotary: Rotary) -> Work:
    return lambda: rotary_angles(streams.positions(), rotary)


def _block_works(block: Any, streams: Streams, angles: Any, attenuation: Any) -> Iterator[tuple[str, Work]]:
    x, (score, weight) = streams.residual, attenuation
    score, weight = (None if each is None else _like(each) for each in (score, weight))
    scale = 1 if weight is None else weight[..., None]
    yield "attention", lambda: x + scale * block.attention(block.attention_norm(x), *angles, score)
    yield "mlp", lambda: x + scale * block.mlp(block.mlp_norm(x))


def _merge(model: ThoughtbubblesForCausalLM, streams: Streams, weighted: bool) -> Work:
    return lambda: streams.merge_residuals(streams.shares()) if weighted else None


def _leaf(streams: Streams) -> Streams:
    return replace(streams, residual=_like(streams.residual), log_score=_like(streams.log_score))


def _like(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()
