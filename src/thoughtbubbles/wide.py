"""Layers and measures that compute in float32 or wider, whatever the type of their input: for scores (Design 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm in float32 or wider, whatever the type of input and weights."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the parent's name)
        """[..., D] -> [..., D]."""
        wide = torch.promote_types(input.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(input.to(wide), self.normalized_shape, self.weight.to(wide), bias, self.eps)


class WideLinear(nn.Linear):
    """Linear map to few outputs in float32 or wider; a module, so that adapters can wrap it.

    Sums over the last dimension, since the kernels of a product of matrices add up one row otherwise than the same row
    among others, which could tell equal streams apart.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the parent's name)
        """[..., D] -> [..., 2]."""
        return torch.stack([(input * row).sum(-1) for row in self.weight.to(input.dtype)], dim=-1)


def root_mean_square(x: Tensor) -> Tensor:
    """[..., D] -> [..., 1]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # At a mean square of 0, that of an empty slot, the root has no gradient.
    return wide.square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()
