"""The effect of a bubble: what deleting all forks of a token does to the predictions at it and after it.

All other streams survive as they did, at every fork layer: survivors are given, so that nothing but the
token's own bubble differs.

Shape letters: A tokens whose forks are deleted, T tokens, N streams, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thoughtbubbles.inspection.observing import evaluating
from thoughtbubbles.inspection.trace import check_row, predictions
from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.gate import ForkGate, pack_left
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.model.streams import Streams

__all__ = ["ablate"]


@dataclass(frozen=True)
class Ablation:
    """What deleting bubbles did, one token's at a time.

    Attributes:
        tokens: A, the ordinals of the tokens whose forks were deleted.
        change: A lists of T - 1: by how much, in nats, the surprisal of each next token grew; what stands before the
            token is 0.
    """

    tokens: list[int]
    change: list[list[float]]

    def at_lag(self, lag: int) -> list[float]:
        """The change at the token itself (0) or so many tokens later, for each of the A that has one there."""
        found = zip(self.tokens, self.change, strict=True)
        return [change[token + lag] for token, change in found if token + lag < len(change)]


@contextmanager
def given_survivors(model: ThoughtbubblesForCausalLM, survivors: Mapping[int, Tensor]) -> Iterator[None]:
    """Let the forward passes inside the block keep the candidates given, not those that routing chooses.

    Args:
        survivors: by fork layer, bool [B, M], M twice the width before the layer; alive candidates alone, the keep of
            every root among them.
    """
    gates = model.model.gates
    hooks = [
        gates[str(layer)].register_forward_hook(partial(_replace, survive)) for layer, survive in survivors.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def survivors_without(trail: Sequence[Streams], fork_layers: Sequence[int], tokens: Sequence[int]) -> dict[int, Tensor]:
    """Survivors by fork layer, bool [A, M], of row a of a batch in which token a of `tokens` has no forks.

    Args:
        trail: the streams that enter each block of one row that was run with all its forks.
    """
    device = trail[0].token.device
    target = torch.tensor(tokens, device=device)[:, None]
    # Which of the streams before the next fork layer each row has; at the input all of them, one a token.
    present = torch.ones(len(tokens), trail[0].num_tokens, dtype=torch.bool, device=device)
    found: dict[int, Tensor] = {}
    for layer in fork_layers:
        streams = trail[layer]
        assert streams.origin is not None
        spared = streams.alive & (streams.is_root | (streams.token != target))
        origin = streams.origin.clamp(min=0).expand_as(spared)
        kept = torch.zeros(len(tokens), 2 * present.shape[1], dtype=torch.int64, device=device)
        survive = kept.scatter_add(1, origin, spared.long()) > 0
        # A row packs its streams to the left, and its candidates with them.
        candidates, exists = pack_left(present.repeat_interleave(2, dim=1), survive.shape[1])
        found[layer] = survive.gather(1, candidates) & exists
        present = spared
    return found


def logits_without(
    model: ThoughtbubblesForCausalLM, ids: Sequence[int], tokens: Sequence[int], budget: Budget | None = None
) -> tuple[Tensor, Tensor]:
    """Next-token logits of one row of ids, [1, T, V], and with the forks of each of `tokens` deleted, [A, T, V].

    Raises:
        ValueError: for a model without gates, no token or one that the row does not have, no ids or too many of them,
            or a bad budget.
    """
    if not tokens:
        raise ValueError("tokens=[]: expected at least one")
    (pair,) = _each_without(model, ids, tokens, budget, len(tokens))
    return pair


def ablate(
    model: ThoughtbubblesForCausalLM,
    ids: Sequence[int],
    tokens: Sequence[int],
    budget: Budget | None = None,
    batch_size: int = 4,
    on_progress: Callable[[int], None] | None = None,
) -> Ablation:
    """Delete all forks of each of `tokens`, one token at a time, and compare every prediction of the row.

    Args:
        ids: T token ids of one row.
        tokens: A ordinals.
        batch_size: how many of them to run at a time.
        on_progress: called with the number of tokens done since the last call.

    Raises:
        ValueError: as `logits_without`.
    """
    row = torch.tensor([list(ids)], device=model.device)
    changes = []
    for whole, without in _each_without(model, ids, tokens, budget, batch_size):
        changes.append(predictions(without, row.expand(len(without), -1))[1] - predictions(whole, row)[1])
        if on_progress is not None:
            on_progress(len(without))
    change = torch.cat(changes) if changes else row.new_zeros(0, row.shape[1] - 1)
    # What stands before a token cannot depend on its forks, but rounding depends on the batch size.
    place = torch.tensor(list(tokens), dtype=torch.int64, device=row.device)[:, None]
    before = torch.arange(change.shape[1], device=row.device) < place
    return Ablation(list(tokens), change.masked_fill(before, 0).tolist())


def _each_without(
    model: ThoughtbubblesForCausalLM, ids: Sequence[int], tokens: Sequence[int], budget: Budget | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The results of `logits_without` for so many tokens at a time."""
    layers = model.config.gated_layers
    if not layers:
        raise ValueError(f"routing={model.config.routing!r}: expected a model with gates, whose forks can be deleted")
    check_row(model, ids)
    strangers = [token for token in tokens if not 0 <= token < len(ids)]
    if strangers:
        raise ValueError(f"token={strangers[0]}: expected one from 0 to {len(ids) - 1}")
    row = torch.tensor([list(ids)], device=model.device)
    with evaluating(model):
        whole = model(row, budget=budget, output_streams=True)
    for start in range(0, len(tokens), batch_size):
        part = tokens[start : start + batch_size]
        survivors = survivors_without(whole.streams, layers, part)
        with evaluating(model), given_survivors(model, survivors):
            without = model(row.expand(len(part), -1), budget=budget).logits
        yield whole.logits, without


def _replace(survive: Tensor, gate: nn.Module, arguments: tuple[Any, ...], chosen: Streams) -> Streams:
    """The output of a gate with the given survivors in place of those chosen."""
    assert isinstance(gate, ForkGate)
    streams: Streams = arguments[0]
    origin, alive = pack_left(survive, chosen.token.shape[1])
    return gate.select(streams, gate.candidate_scores(streams), origin, alive)
