"""The language-modelling loss: each real token against the next real token of its row (Design 3.7).

Shape letters: B batch, T tokens, D hidden size, V vocabulary, R = B T.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .columns import ColumnMap

IGNORE_INDEX = -100
ROWS = 512
"""Rows of logits to hold at a time: more leave a processor's cache, fewer add up the matrix's gradient too often."""


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


def chunked_next_token_loss(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """`next_token_loss` of the logits hidden @ unembedding.T, of which only some rows are held at a time.

    Their gradients are formed in the forward pass, chunk by chunk, so that nothing of the vocabulary's width waits for
    the backward pass.

    Args:
        hidden: [B, T, D].
        unembedding: [V, D].
        targets: [B, T].
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    count = (targets != IGNORE_INDEX).sum() if num_items is None else torch.as_tensor(num_items, device=hidden.device)
    # Inside an autograd function nothing tells whether gradients are wanted at all.
    wanted = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        loss: Tensor = _ChunkedCrossEntropy.apply(
            hidden.flatten(0, 1), unembedding, targets.flatten(), count, dtype, wanted
        )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unembedding: Tensor, targets: Tensor, count: Tensor, dtype: torch.dtype, wanted: bool
    ) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        matrix = unembedding.to(dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted and ctx.needs_input_grad[0] else None
        grad_matrix = None
        for rows in (slice(first, first + ROWS) for first in range(0, len(hidden), ROWS)):
            x, real = hidden[rows].to(dtype), targets[rows] != IGNORE_INDEX
            place = targets[rows].clamp(min=0)[:, None]
            logits = (x @ matrix.T).to(wide)
            log_sum = logits.logsumexp(1, keepdim=True)
            loss += (log_sum - logits.gather(1, place))[:, 0].where(real, 0).sum()
            if not wanted:
                continue
            # Chosen, not multiplied: of no targets 1 / count is infinite, and their gradients are zero.
            weight = torch.where(real, 1 / count.to(wide), 0)[:, None]
            grad = logits.sub_(log_sum).exp_().mul_(weight).scatter_add_(1, place, -weight).to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ matrix
            if ctx.needs_input_grad[1]:
                grad_matrix = _add_product(grad_matrix, grad.T, x)
        ctx.save_for_backward(grad_hidden, None if grad_matrix is None else grad_matrix.to(unembedding.dtype))
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_matrix = (each if each is None else each * grad_loss for each in ctx.saved_tensors)
        return grad_hidden, grad_matrix, None, None, None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b in float32 or wider, in place where it can be: the matrices are as large as the unembedding."""
    if total is None:
        return (a @ b).to(torch.promote_types(a.dtype, torch.float32))
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)
