"""The language-modelling loss: each real token against the next real token of its row (Design 3.7)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .streams import ColumnMap

IGNORE_INDEX = -100


def next_token_targets(labels: Tensor, columns: ColumnMap | None) -> Tensor:
    """For each column [B, T] the label of its row's next real token; -100 where there is none."""
    if columns is None:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    ordered = columns.compact(labels).masked_fill(~columns.alive, IGNORE_INDEX)
    targets = columns.restore(F.pad(ordered[:, 1:], (0, 1), value=IGNORE_INDEX))
    return targets.masked_fill(~columns.real, IGNORE_INDEX)


def next_token_loss(logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in nats, float32 or wider: the mean over the targets, or their sum divided by `num_items`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)
    return loss if num_items is None else loss / torch.as_tensor(num_items, device=loss.device)
