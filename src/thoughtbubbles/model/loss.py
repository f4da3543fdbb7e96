"""The language-modelling loss: each real token against the next real token of its row (method: Padding).

Shape letters: B batch, T tokens, N streams, D hidden size, V vocabulary, R = B T or B N, C rows of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .streams import ColumnMap

IGNORE_INDEX = -100
ROWS = 512
"""Rows of logits to hold at a time: more leave a processor's cache, fewer add up the matrix's gradient too often."""
ALIGNMENT = {"cuda": 64}
"""By type of device, what the number of logits is filled up to a multiple of: a GPU's products are slow at odd ones."""


def next_token_targets(labels: Tensor, columns: ColumnMap | None) -> Tensor:
    """For each column [B, T] the label of its row's next real token; -100 where there is none."""
    if columns is None:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    ordered = columns.compact(labels).masked_fill(~columns.alive, IGNORE_INDEX)
    targets = columns.restore(F.pad(ordered[:, 1:], (0, 1), value=IGNORE_INDEX))
    return targets.masked_fill(~columns.real, IGNORE_INDEX)


def assert_in_vocabulary(targets: Tensor, vocab_size: int) -> None:
    """Make sure that targets [B, T] are token ids or -100, without waiting for the device that holds them.

    Raises:
        RuntimeError: for another; from a GPU as an assertion of the device, at some later call.
    """
    known = (targets >= 0) & (targets < vocab_size) | (targets == IGNORE_INDEX)
    torch._assert_async(known.all(), f"labels: expected token ids from 0 to {vocab_size - 1}, or {IGNORE_INDEX}")


def next_token_loss(logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in nats, float32 or wider: the mean over the targets, or their sum divided by `num_items`.

    As with torch's own, the mean of no targets is nan and its gradients are zero.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)
    return loss if num_items is None else loss / torch.as_tensor(num_items, device=loss.device)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, T] cross-entropies in nats, float32 or wider; 0 where there is no target."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
    return F.cross_entropy(wide, targets, ignore_index=IGNORE_INDEX, reduction="none")


@dataclass(frozen=True)
class Bubbles:
    """Which of some hidden states [B, N, D] predict one token together: a mixture of their distributions.

    Attributes:
        log_score: [B, N] float32 or wider: the weights of a bubble are proportional to their exponentials.
        begins: [B, N] bool: the leftmost of each bubble.
        widest: the most hidden states that a bubble can have.
    """

    log_score: Tensor
    begins: Tensor
    widest: int


def chunked_next_token_loss(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    num_items: Tensor | int | None = None,
    bubbles: Bubbles | None = None,
) -> Tensor:
    """`next_token_loss` of the logits hidden @ unembedding.T, of which only some rows are held at a time.

    Their gradients are formed in the forward pass, chunk by chunk, so that nothing of the vocabulary's width waits for
    the backward pass.

    Args:
        hidden: [B, T, D].
        unembedding: [V, D].
        targets: [B, T].
        num_items: what to divide the sum by; None is the number of targets.
        bubbles: the hidden states [B, N, D] of each bubble are mixed, and `targets` [B, N] says the same of all.
    """
    device = hidden.device.type
    counted = targets != IGNORE_INDEX if bubbles is None else (targets != IGNORE_INDEX) & bubbles.begins
    count = counted.sum() if num_items is None else torch.as_tensor(num_items, device=hidden.device)
    dtype, mixing = _product_dtype(hidden), () if bubbles is None else _flat(bubbles)
    # Inside an autograd function nothing tells whether gradients are wanted at all.
    wanted = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        loss: Tensor = _ChunkedCrossEntropy.apply(
            hidden.flatten(0, 1), unembedding, targets.flatten(), count, dtype, wanted, *mixing
        )
    return loss


@torch.no_grad()
def chunked_token_losses(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, bubbles: Bubbles | None = None
) -> Tensor:
    """[B, T] the terms of `chunked_next_token_loss`, 0 where there is no target; a bubble's is that of its leftmost."""
    dtype, mixing = _product_dtype(hidden), () if bubbles is None else _flat(bubbles)
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = _aligned(unembedding, dtype)
        chunks = _chunks(hidden.flatten(0, 1), matrix, len(unembedding), targets.flatten(), *mixing)
        found = [-chunk.log_prob[:ROWS] for chunk in chunks]
    return torch.cat(found).view(targets.shape)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _aligned(unembedding: Tensor, dtype: torch.dtype) -> Tensor:
    """[V, D] in the type of the products, on some devices with rows of zeros below."""
    spare = -len(unembedding) % ALIGNMENT.get(unembedding.device.type, 1)
    matrix = unembedding.to(dtype)
    return F.pad(matrix, (0, 0, 0, spare)) if spare else matrix


def _flat(bubbles: Bubbles) -> tuple[Tensor, Tensor, int]:
    return bubbles.log_score.flatten(), bubbles.begins.flatten(), bubbles.widest


@dataclass(frozen=True)
class _Chunk:
    """Some rows of hidden states, decoded.

    Attributes:
        rows: which.
        x: [C, D] they, in the type of the products.
        place: [C, 1] their targets, 0 where there is none.
        logits: [C, V or more], -inf beyond the vocabulary.
        log_sum: [C, 1] of the logits.
        log_prob: [C] of the target; of a mixture at the leftmost row of its bubble. 0 elsewhere and without a target.
        weight, share: [C] of each row in its mixture before and after the target is known; 0 without a target.
    """

    rows: slice
    x: Tensor
    place: Tensor
    logits: Tensor
    log_sum: Tensor
    log_prob: Tensor
    weight: Tensor
    share: Tensor


def _chunks(
    hidden: Tensor,
    matrix: Tensor,
    vocab_size: int,
    targets: Tensor,
    log_score: Tensor | None = None,
    begins: Tensor | None = None,
    widest: int = 1,
) -> Iterator[_Chunk]:
    """ROWS rows at a time, and as many more as the last bubble that begins among them can need.

    A bubble counts in the chunk in which it begins.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    for first in range(0, len(hidden), ROWS):
        rows = slice(first, first + ROWS + widest - 1)
        x, real = hidden[rows].to(matrix.dtype), targets[rows] != IGNORE_INDEX
        place = targets[rows].clamp(min=0)[:, None]
        logits = (x @ matrix.T).to(wide)
        if vocab_size < len(matrix):
            logits[:, vocab_size:] = -torch.inf
        log_sum = logits.logsumexp(1, keepdim=True)
        log_prob = (logits.gather(1, place) - log_sum)[:, 0]
        if log_score is None or begins is None:
            ones = real.to(wide)
            mixed = log_prob.where(real, 0), ones, ones
        else:
            mixed = _mix(log_prob, real, log_score[rows], begins[rows])
        yield _Chunk(rows, x, place, logits, log_sum, *mixed)


def _mix(log_prob: Tensor, real: Tensor, log_score: Tensor, begins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `_Chunk` says of mixtures, all [C], for the bubbles that begin in the first ROWS rows and have a target."""
    bubble = begins.cumsum(0)  # 0 is one that began in an earlier chunk
    counted = real & (bubble > 0) & (bubble <= bubble[:ROWS][-1])
    joint = log_score + log_prob
    before, after = (_bubble_logsumexp(each, bubble) for each in (log_score, joint))
    weight, share = (log_score - before).exp(), (joint - after).exp()
    return (after - before).where(counted & begins, 0), weight.where(counted, 0), share.where(counted, 0)


def _bubble_logsumexp(values: Tensor, bubble: Tensor) -> Tensor:
    """For each row [C] that of its bubble; `bubble` [C] are their numbers from 0 to C."""
    empty = values.new_zeros(len(values) + 1)
    top = empty.scatter_reduce(0, bubble, values, "amax", include_self=False)[bubble]
    return empty.scatter_add(0, bubble, (values - top).exp())[bubble].log() + top


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Of hidden [R, D], unembedding [V, D], targets [R]; and log_score and begins [R] of mixtures."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        unembedding: Tensor,
        targets: Tensor,
        count: Tensor,
        dtype: torch.dtype,
        wanted: bool,
        log_score: Tensor | None = None,
        begins: Tensor | None = None,
        widest: int = 1,
    ) -> Tensor:
        vocab_size, matrix = len(unembedding), _aligned(unembedding, dtype)
        loss = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wanted and ctx.needs_input_grad[0] else None
        grad_score = torch.zeros_like(log_score) if wanted and log_score is not None else None
        grad_matrix = None
        # Without targets the loss is nan, but its gradients are zero.
        scale = torch.where(count == 0, 0, 1 / count.to(loss.dtype))
        for chunk in _chunks(hidden, matrix, vocab_size, targets, log_score, begins, widest):
            loss -= chunk.log_prob.sum()
            if not wanted:
                continue
            if grad_score is not None:
                grad_score[chunk.rows] += (chunk.weight - chunk.share) * scale
            share = (chunk.share * scale)[:, None]
            grad = chunk.logits.sub_(chunk.log_sum).exp_().mul_(share).scatter_add_(1, chunk.place, -share).to(dtype)
            if grad_hidden is not None:
                grad_hidden[chunk.rows] += grad @ matrix
            if ctx.needs_input_grad[1]:
                grad_matrix = _add_product(grad_matrix, grad.T, chunk.x)
        grad_matrix = None if grad_matrix is None else grad_matrix[:vocab_size].to(unembedding.dtype)
        ctx.save_for_backward(grad_hidden, grad_matrix, grad_score)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_matrix, grad_score = (
            each if each is None else each * grad_loss for each in ctx.saved_tensors
        )
        return grad_hidden, grad_matrix, None, None, None, None, grad_score, None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b in float32 or wider, in place where it can be: the matrices are as large as the unembedding."""
    if total is None:
        return (a @ b).to(torch.promote_types(a.dtype, torch.float32))
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)
