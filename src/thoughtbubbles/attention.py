"""Rotary embedding at fractional positions and attenuated causal attention (Design 3.4, 3.5).

Shape letters: B batch, N streams, D hidden size, H heads, K head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thoughtbubbles.configuration import ThoughtbubblesConfig


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, N, K / 2] for float positions [B, N], in the positions' type (Design 3.4)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=positions.dtype) / head_dim
    angles = positions[:, None, :, None] * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, N, K]; channel j turns with channel j + K / 2."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attenuated_attention(q: Tensor, k: Tensor, v: Tensor, log_score: Tensor | None, rule: str) -> Tensor:
    """Causal attention in packed order over streams with log scores (Design 3.5).

    Args:
        q, k, v: [B, H, N, K], q and k already rotated.
        log_score: [B, N]; None for scores that are all 0, or where attenuation is `none`.
        rule: `paper` or `released`.

    Returns:
        [B, H, N, K]. Memory is linear in N: the bias depends on the key alone and rides in a channel of k.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    if log_score is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    v = v * log_score.exp().to(v.dtype)[:, None, :, None]
    if rule == "released":
        bias = log_score.to(k.dtype)[:, None, :, None].expand(-1, k.shape[1], -1, -1)
        q = torch.cat([q[..., :-1], torch.ones_like(q[..., :1])], dim=-1)
        k = torch.cat([k[..., :-1], bias], dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    channels = _bias_channels(log_score / scale, k)
    width = channels.shape[-1]
    out = F.scaled_dot_product_attention(
        torch.cat([q, torch.ones_like(q[..., :width])], dim=-1),
        torch.cat([k, channels], dim=-1),
        F.pad(v, (0, width)),  # the fused kernels want values as wide as keys
        is_causal=True,
        scale=scale,
    )
    return out[..., : v.shape[-1]]


def _bias_channels(bias: Tensor, k: Tensor) -> Tensor:
    """The key channels [B, H, N, 1 or 2] that add `bias` [B, N] to q.k for a q of ones.

    A 16-bit type gets a second channel with the part that rounding took from the first: bfloat16 alone would
    cost 0.4% of the bias.
    """
    high = bias.to(k.dtype)
    parts = [high]
    if k.dtype.itemsize == 2:
        parts.append((bias - high.to(bias.dtype)).to(k.dtype))
    return torch.stack(parts, dim=-1)[:, None].expand(-1, k.shape[1], -1, -1)


class ResidualProjection(nn.Linear):
    """A linear layer whose output is added to the residual stream: initialised smaller (Design 5.1)."""


class StreamAttention(nn.Module):
    """Multi-head attention among streams, attenuated by their log scores."""

    def __init__(self, config: ThoughtbubblesConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.rule = config.attenuation
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.use_bias)
        self.o_proj = ResidualProjection(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, log_score: Tensor | None) -> Tensor:
        """x [B, N, D] -> [B, N, D]; `log_score` as in `attenuated_attention`."""
        batch, width, hidden = x.shape
        q, k, v = self.qkv_proj(x).view(batch, width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = attenuated_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, log_score, self.rule)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, width, hidden))
        return projected
