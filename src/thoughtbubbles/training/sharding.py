"""What is made of a model before it trains: divided over processes (torch's FSDP2, `fully_shard`), or compiled."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from thoughtbubbles.model.graph import MOST_GRAPHS

if TYPE_CHECKING:
    from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM


def divide(model: "ThoughtbubblesForCausalLM", processes: int, device: str, bfloat16: bool) -> None:
    """Leave this process its share of every parameter, in place.

    A group for each block, gathered while the block is at work, and one for the rest, gathered for the whole step. The
    gates are of the rest: streams pass through them in a class of their own, in which torch finds no tensors to hook.

    With `bfloat16` the blocks are gathered so, and the products are autocast's as with DDP: copies that autocast made
    of float32 weights would stay whole until the backward pass. Gradients are averaged in float32. The rest stays
    float32, with it the residual streams and the gates. On CPUs, whose LayerNorm takes no weights of another type than
    its input's, all is gathered in float32.

    Args:
        device: type of device that the processes compute on.
    """
    mesh = init_device_mesh(device, (processes,))
    narrow = torch.bfloat16 if bfloat16 and device != "cpu" else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def release(model: nn.Module) -> None:
    """Give back what a forward pass without a backward one left gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes, which must all ask."""
    gathered: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered


LRU_CACHE_WARNING = "Dynamo detected a call to a `functools.lru_cache`-wrapped function"


def compile_model(
    model: "ThoughtbubblesForCausalLM", pieces: str, backend: str | Callable[..., Any] = "inductor"
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
    # Blocks that are compiled by themselves share their graphs, one for each width, mode and budget.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    if pieces == "whole":
        model.compile(fullgraph=True, dynamic=False, backend=backend)
        return
    for module in (*model.model.layers, *model.model.gates.values()):
        # Inside the hooks: those that gather and release weights, and those that watch the gates.
        module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False, backend=backend)
