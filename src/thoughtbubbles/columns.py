"""Padding: which columns of a row hold its tokens (Design 3.1, 3.7).

Shape letters: B batch, T columns, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ColumnMap:
    """Where the real tokens of a row stand among its columns (Design 3.1).

    Attributes:
        column: [B, T] int64, the column of each ordinal; past a row's last token, its padding columns.
        ordinal: [B, T] int64, the ordinal of each real column (0 and up); padding repeats a neighbour's.
        real: [B, T] bool, the columns that hold real tokens.
        alive: [B, T] bool, the ordinals that exist: a run of True at the left.
    """

    column: Tensor
    ordinal: Tensor
    real: Tensor
    alive: Tensor

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> "ColumnMap":
        """attention_mask [B, T], non-zero at real tokens, which may stand anywhere."""
        real = attention_mask != 0
        count = real.sum(1, keepdim=True)
        return cls(
            column=torch.argsort(~real, dim=1, stable=True),
            ordinal=(real.cumsum(1) - 1).clamp(min=0),
            real=real,
            alive=torch.arange(real.shape[1], device=real.device) < count,
        )

    def compact(self, values: Tensor) -> Tensor:
        """Columns [B, T] or [B, T, D] to ordinals: real tokens to the left in their order."""
        return _take(values, self.column)

    def restore(self, values: Tensor) -> Tensor:
        """Ordinals [B, T] or [B, T, D] to columns; at padding some finite value that means nothing."""
        return _take(values, self.ordinal)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values[b, index[b, i]] for values [B, T] or [B, T, D]."""
    return values.gather(1, index) if values.dim() == 2 else values.gather(1, index[..., None].expand_as(values))
