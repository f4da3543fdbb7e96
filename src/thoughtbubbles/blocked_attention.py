"""Causal attention in blocks, for bfloat16 on CPUs (Design 3.5).

PyTorch's fused CPU kernel does its products of bfloat16 at a fraction of the speed of the library's batched products,
above all backward. This one is made of those: a block of queries of a few rows at a time against the keys up to its
end, so that memory stays linear in the number of streams. Scores are softmaxed, and their gradients formed, in float32
or wider.

Shape letters: B batch, N streams, H heads, K head size; e keys up to the end of a block, r queries in it.
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
    """Whether this is the faster way for such queries; a compiler makes its own kernels."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.compiler.is_compiling()


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax over the keys at or left of each query of scale * q.k + bias, times the values.

    Args:
        q, k, v: [B, H, N, K].
        bias: [B, N] of the keys, in float32 or wider; None is 0.

    Returns:
        [B, H, N, K].
    """
    if bias is None:
        bias = torch.zeros(len(q), q.shape[2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    out: Tensor = _BlockedAttention.apply(q, k, v, bias, scale)
    return out


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for rows, queries, keys in _blocks(q):
            weights = _weights(q[rows], k[rows], bias[rows], scale, queries, keys)
            out[rows, :, queries] = _product(weights.to(v.dtype), v[rows, :, keys])
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q, k, v, bias, out = ctx.saved_tensors
        # For each query the mean of the gradient over its weights, which the softmax takes off.
        mean = (grad_out.to(bias.dtype) * out.to(bias.dtype)).sum(-1, keepdim=True)
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k, grad_v, grad_bias = (torch.zeros(x.shape, dtype=bias.dtype, device=x.device) for x in (k, v, bias))
        for rows, queries, keys in _blocks(q):
            weights = _weights(q[rows], k[rows], bias[rows], ctx.scale, queries, keys)
            grad = grad_out[rows, :, queries]
            grad_v[rows, :, keys] += _product(weights.to(v.dtype).mT, grad)
            grad_scores = torch.sub(_product(grad, v[rows, :, keys].mT), mean[rows, :, queries]).mul_(weights)
            grad_bias[rows, keys] += grad_scores.sum((1, 2))
            grad_scores = grad_scores.mul_(ctx.scale).to(q.dtype)
            grad_q[rows, :, queries] = _product(grad_scores, k[rows, :, keys])
            grad_k[rows, :, keys] += _product(grad_scores.mT, q[rows, :, queries])
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, None


def _blocks(q: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of the batch, queries and the keys that these may see."""
    batch, heads, length, _ = q.shape
    step = max(1, SCORES // (heads * min(QUERIES, length) * length))
    for row in range(0, batch, step):
        for first in range(0, length, QUERIES):
            end = min(first + QUERIES, length)
            yield slice(row, row + step), slice(first, end), slice(0, end)


def _weights(q: Tensor, k: Tensor, bias: Tensor, scale: float, queries: slice, keys: slice) -> Tensor:
    """[B, H, r, e] softmaxed."""
    products = _product(q[:, :, queries], k[:, :, keys].mT)
    scores = torch.add(bias[:, None, None, keys], products, alpha=scale)
    size = queries.stop - queries.start
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    scores[..., queries].masked_fill_(later, -torch.inf)
    return scores.softmax(-1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product over two leading dimensions, which need not be contiguous."""
    product: Tensor = torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
    return product
