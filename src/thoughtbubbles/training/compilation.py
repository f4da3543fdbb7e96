"""torch.compile for training and evaluation (Design 3.9)."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from thoughtbubbles.modeling import ThoughtbubblesForCausalLM

MOST_GRAPHS = 256
"""Of one function: blocks that are compiled by themselves share theirs, one for each width, mode and budget."""
LRU_CACHE_WARNING = "Dynamo detected a call to a `functools.lru_cache`-wrapped function"


def compile_model(
    model: ThoughtbubblesForCausalLM, divided: bool, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile what the model's forward does, in place: shapes are static, each budget has a graph of its own.

    A model that `sharding.divide` has divided gathers weights between its blocks, which no graph can hold: its blocks
    and gates are compiled each by itself.

    Nothing falls back to uncompiled code unsaid: what does not go into a graph raises.
    """
    # Of budgets in exact arithmetic, which are constants to a graph.
    warnings.filterwarnings("ignore", message=LRU_CACHE_WARNING)
    # Torch's own limit is 8, which a few budgets reach.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    if not divided:
        model.compile(fullgraph=True, dynamic=False, backend=backend)
        return
    for module in (*model.model.layers, *model.model.gates.values()):
        # Inside the hooks that gather and release the weights.
        module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False, backend=backend)
