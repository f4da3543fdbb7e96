"""torch.compile for training and evaluation."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM

MOST_GRAPHS = 256
"""Of one function: blocks that are compiled by themselves share theirs, one for each width, mode and budget."""
LRU_CACHE_WARNING = "Dynamo detected a call to a `functools.lru_cache`-wrapped function"


def compile_model(
    model: ThoughtbubblesForCausalLM, pieces: str, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile what the model's forward does, in place: shapes are static, each budget has graphs of its own.

    `blocks` compiles each block, and each gate with its routing, by itself: blocks of one width share their graph, so
    that a deep model is made as fast as a shallow one, and what gathers a divided model's weights stands between them.
    `whole` makes one graph of all.

    Nothing falls back to uncompiled code unsaid: what does not go into a graph raises.

    Args:
        pieces: `blocks` or `whole`.
    """
    # Of budgets in exact arithmetic, which are constants to a graph.
    warnings.filterwarnings("ignore", message=LRU_CACHE_WARNING)
    # Torch's own limit is 8, which a few budgets reach.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    if pieces == "whole":
        model.compile(fullgraph=True, dynamic=False, backend=backend)
        return
    for module in (*model.model.layers, *model.model.gates.values()):
        # Inside the hooks: those that gather and release weights, and those that watch the gates.
        module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False, backend=backend)
