"""Norms of a block (method: The block)."""

import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import ThoughtbubblesConfig


class RMSNorm(nn.RMSNorm):
    """RMSNorm; numbers of 16 bits are rounded before the gain, as in transformers, whose bits count for a retrofit."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if x.dtype.itemsize > 2:
            return super().forward(x)
        return self.weight.to(x.dtype) * F.rms_norm(x, self.normalized_shape, None, self.eps)


def block_norm(config: ThoughtbubblesConfig) -> nn.Module:
    """The norm of residuals that a configuration has."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)


def head_norm(config: ThoughtbubblesConfig) -> nn.Module:
    """That of a head's queries or keys; the identity where they have none."""
    return RMSNorm(config.head_dim, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
