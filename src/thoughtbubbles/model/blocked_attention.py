"""Causal attention in blocks, for bfloat16 on CPUs (method: Attenuation).

PyTorch's fused CPU kernel does its products of bfloat16 at a fraction of the speed of the library's batched products,
above all backward; without a backward pass it stays, so that a retrofitted model's bits are those of its own class.
This one is made of batched products: a block of queries of a few rows at a time against the keys up to its end, so that
memory stays linear in the number of streams. Scores are softmaxed, and their gradients formed, in float32 or wider.

Shape letters: B batch, N streams, H heads, G heads of keys and values, K head size; g of the B G, each with s = H / G
heads of queries; e keys up to the end of a block, r queries in it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 64
"""Queries of a block: fewer waste less above the diagonal, more make larger products."""
SCORES = 400_000
"""About how many scores to hold at a time: as float32 they should fit a core's cache."""


def suits(q: Tensor) -> bool:
    """Whether this is the faster way for such queries, forward and backward; a compiler makes its own kernels."""
    learns = torch.is_grad_enabled() and q.requires_grad
    return learns and q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.compiler.is_compiling()


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax over the keys at or left of each query of scale * q.k + bias, times the values.

    Args:
        q: [B, H, N, K].
        k, v: [B, G, N, K], each head for H / G neighbouring ones of q.
        bias: [B, N] of the keys, in float32 or wider; None is 0.

    Returns:
        [B, H, N, K].
    """
    batch, groups, length = k.shape[:3]
    if bias is None:
        bias = torch.zeros(batch, length, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    biases = bias[:, None].expand(-1, groups, -1).flatten(0, 1)
    queries = q.reshape(batch * groups, -1, length, q.shape[-1])
    out: Tensor = _BlockedAttention.apply(queries, k.flatten(0, 1), v.flatten(0, 1), biases, scale)
    return out.view(q.shape)


class _BlockedAttention(torch.autograd.Function):
    """Of q [g, s, N, K], k, v [g, N, K] and bias [g, N]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(q)
        for rows, queries, keys in _blocks(q):
            asked = q[rows, :, queries]
            weights = _weights(asked, k[rows, keys], bias[rows, keys], scale)
            out[rows, :, queries] = (weights.to(v.dtype) @ v[rows, keys]).view_as(asked)
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q, k, v, bias, out = ctx.saved_tensors
        # For each query the mean of the gradient over its weights, which the softmax takes off.
        mean = (grad_out.to(bias.dtype) * out.to(bias.dtype)).sum(-1, keepdim=True)
        grad_q = torch.empty_like(q)
        grad_k, grad_v, grad_bias = (torch.zeros_like(each, dtype=bias.dtype) for each in (k, v, bias))
        for rows, queries, keys in _blocks(q):
            asked = q[rows, :, queries]
            weights = _weights(asked, k[rows, keys], bias[rows, keys], ctx.scale)
            grad = grad_out[rows, :, queries].flatten(1, 2)
            grad_v[rows, keys] += weights.to(v.dtype).mT @ grad
            grad_scores = torch.sub(grad @ v[rows, keys].mT, mean[rows, :, queries].flatten(1, 2)).mul_(weights)
            grad_bias[rows, keys] += grad_scores.sum(1)
            grad_scores = grad_scores.mul_(ctx.scale).to(q.dtype)
            grad_q[rows, :, queries] = (grad_scores @ k[rows, keys]).view_as(asked)
            grad_k[rows, keys] += grad_scores.mT @ asked.flatten(1, 2)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, None


def _blocks(q: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of g, queries and the keys that these may see."""
    rows, shared, length, _ = q.shape
    step = max(1, SCORES // (shared * min(QUERIES, length) * length))
    for row in range(0, rows, step):
        for first in range(0, length, QUERIES):
            end = min(first + QUERIES, length)
            yield slice(row, row + step), slice(first, end), slice(0, end)


def _weights(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    """[g, s r, e] softmaxed, of the last r of e streams."""
    scores = torch.add(bias[:, None], q.flatten(1, 2) @ k.mT, alpha=scale)
    shared, queries = q.shape[1:3]
    later = torch.ones(queries, queries, dtype=torch.bool, device=q.device).triu(1)
    scores[..., -queries:].masked_fill_(later.repeat(shared, 1), -torch.inf)
    return scores.softmax(-1)
