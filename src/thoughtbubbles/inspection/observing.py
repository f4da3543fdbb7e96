"""Watching the gates and the attention of forward passes from outside, by hooks.

Shape letters: B batch, N streams, H heads, K head size.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thoughtbubbles.model.attention import StreamAttention, attenuate
from thoughtbubbles.model.gate import ForkGate
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.model.streams import Streams


@dataclass
class Observation:
    """What one forward pass showed, by layer.

    Attributes:
        gates: [B, N, 2] log of the fork's and of the keep's gate for each stream that came to the fork layer.
        attention: [B, N, N] weight of each query (row) on each key, the mean over the heads; a row sums to 1. What a
            dead slot gives means nothing.
    """

    gates: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def observing(model: ThoughtbubblesForCausalLM) -> Iterator[Observation]:
    """Note the gates and the attention of the forward pass inside the block; it must be one without a cache.

    Attention is computed a second time for it, with a matrix of N x N at a time.
    """
    seen = Observation()
    hooks = [
        gate.register_forward_pre_hook(partial(_note_gate, seen, int(name))) for name, gate in model.model.gates.items()
    ]
    for block in model.model.layers:
        assert isinstance(block.attention, nn.Module)
        hooks.append(block.attention.register_forward_pre_hook(partial(_note_attention, seen)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: ThoughtbubblesForCausalLM) -> Iterator[None]:
    """Evaluation mode inside the block, without gradients; afterwards the mode that was."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def attention_weights(
    attention: StreamAttention, x: Tensor, cos: Tensor, sin: Tensor, log_score: Tensor | None
) -> Tensor:
    """Weights [B, H, N, N] by which an attention layer averages values; arguments as of its forward.

    They are the softmax alone (method: Attenuation): the values that they average are scaled by p besides.
    """
    q, k, v = attention.project(x, cos, sin)
    width, scale = q.shape[2], 1 / math.sqrt(q.shape[-1])
    if log_score is not None:
        q, k, _ = attenuate(q, k, v, log_score, attention.rule, scale)
    later = torch.ones(width, width, dtype=torch.bool, device=x.device).triu(1)
    # In 16 bits the fused kernels sum their products in float32.
    wide = torch.promote_types(x.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (q.to(wide) @ k.to(wide).mT * scale).masked_fill(later, -math.inf).softmax(-1)


def _note_gate(seen: Observation, layer: int, gate: nn.Module, arguments: tuple[Any, ...]) -> None:
    assert isinstance(gate, ForkGate)
    streams: Streams = arguments[0]
    unscored = replace(streams, log_score=torch.zeros_like(streams.log_score))
    seen.gates[layer] = gate.candidate_scores(unscored).unflatten(1, (-1, 2))


def _note_attention(seen: Observation, attention: nn.Module, arguments: tuple[Any, ...]) -> None:
    assert isinstance(attention, StreamAttention)
    # Blocks come in their order, each as often as it is applied.
    seen.attention[len(seen.attention)] = attention_weights(attention, *arguments[:4]).mean(1)
