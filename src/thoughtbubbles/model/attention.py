"""Rotary embedding at fractional positions and attenuated causal attention (method: Positions, Attenuation, The block).

Shape letters: B batch, N streams, D hidden size, H heads, G heads of keys and values, K head size, R channels of a head
that turn.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocked_attention import blocked_attention, suits
from .cache import AttentionMemory, Placement
from .configuration import ThoughtbubblesConfig
from .norms import head_norm
from .rotary import Rotary


def rotary_angles(positions: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, N, R / 2] for float positions [B, N], in the positions' type (method: Positions)."""
    angles = positions[:, None, :, None] * rotary.frequencies(positions.device, positions.dtype)
    if rotary.factor == 1:
        return angles.cos(), angles.sin()
    return angles.cos() * rotary.factor, angles.sin() * rotary.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first R channels of x [B, H, N, K]; channel j turns with channel j + R / 2."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attenuated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_score: Tensor | None,
    rule: str,
    memory: AttentionMemory | None = None,
    placement: Placement | None = None,
) -> Tensor:
    """Causal attention in packed order over streams with log scores (method: Attenuation).

    Args:
        q: [B, H, N, K], already rotated.
        k, v: [B, G, N, K], k rotated; each of their heads is for H / G neighbouring ones of q.
        log_score: [B, N]; None for scores that are all 0, or where attenuation is `none`.
        rule: `paper` or `released`.
        memory, placement: of a cache, to which the new streams are added and which they see too.

    Returns:
        [B, H, N, K]. Memory is linear in N: the bias depends on the key alone and rides in a channel of k. Only new
        streams beside a filled cache have a mask, [B, 1, N, S].
    """
    head_dim = q.shape[-1]
    scale = 1 / math.sqrt(head_dim)
    blocked = memory is None and suits(q)
    bias = log_score if blocked and rule == "paper" else None
    if bias is not None:
        v = _weigh(v, bias)
    elif log_score is not None:
        q, k, v = attenuate(q, k, v, log_score, rule, scale, cached=memory is not None)
    if blocked:
        return blocked_attention(q, k, v, bias, scale)
    if memory is not None and placement is not None:
        k, v = memory.append(k, v, placement)
    if placement is None or placement.is_causal:
        out = _causal_product(q, k, v, scale)
    else:
        out = _cached_product(q, k, v, placement.mask, scale)
    # Backward, a split is put together in one pass, where a slice fills zeros first.
    return out if v.shape[-1] == head_dim else out.split([head_dim, v.shape[-1] - head_dim], dim=-1)[0]


def _causal_product(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, H, N, K] by a fused kernel."""
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and not shares_keys(q.device.type, q.dtype.itemsize):
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def shares_keys(device: str, itemsize: int) -> bool:
    """Whether a fused kernel for numbers of `itemsize` bytes lets several heads read one of k; those of others copy it.

    A GPU's kernel for float32 does not, and torch would fall back to products that hold [N, N].
    """
    return device != "cuda" or itemsize == 2


def _cached_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, H, N, K] of few queries: those that share a head of k are put one after the other, so that it stays one."""
    batch, heads, new, width = q.shape
    shared = heads // k.shape[1]
    if mask is not None:
        mask = mask.repeat(1, 1, shared, 1)
    out = F.scaled_dot_product_attention(
        q.reshape(batch, -1, shared * new, width), k, v, attn_mask=mask, is_causal=False, scale=scale
    )
    return out.view(batch, heads, new, width)


def attenuate(
    q: Tensor, k: Tensor, v: Tensor, log_score: Tensor, rule: str, scale: float, cached: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v whose plain product, scaled by `scale`, is the attenuated one; `paper` widens them."""
    v = _weigh(v, log_score)
    if rule == "released":
        bias = log_score.to(k.dtype)[:, None, :, None].expand(-1, k.shape[1], -1, -1)
        q = torch.cat([q[..., :-1], torch.ones_like(q[..., :1])], dim=-1)
        return q, torch.cat([k[..., :-1], bias], dim=-1), v
    channels = _bias_channels(log_score / scale, k)
    width = channels.shape[-1]
    # The fused kernels want values as wide as keys.
    spare = attenuated_width(k.shape[-1], k.dtype.itemsize, k.device.type, cached) - k.shape[-1] - width
    # Joined at once, since padding would copy once more, and once more backward.
    zeros, ones = k.new_zeros(()), q.new_ones(())
    q = torch.cat([q, ones.expand(*q.shape[:-1], width), zeros.expand(*q.shape[:-1], spare)], dim=-1)
    k = torch.cat([k, channels, zeros.expand(*k.shape[:-1], spare)], dim=-1)
    return q, k, torch.cat([v, zeros.expand(*v.shape[:-1], width + spare)], dim=-1)


def _weigh(v: Tensor, log_score: Tensor) -> Tensor:
    return v * log_score.exp().to(v.dtype)[:, None, :, None]


def attenuated_width(head_dim: int, itemsize: int, device: str, cached: bool = False) -> int:
    """Channels of a head, as `paper` widens it, in keys and values of `itemsize` bytes a number on a type of device."""
    widened = head_dim + (2 if itemsize == 2 else 1)
    # A GPU's fused kernels want a multiple of 8, a processor's are faster at one; a cache there has no room to spare.
    return widened if cached and device == "cpu" else widened + -widened % 8


def _bias_channels(bias: Tensor, k: Tensor) -> Tensor:
    """The key channels [B, G, N, 1 or 2] that add `bias` [B, N] to q.k for a q of ones.

    A 16-bit type gets a second channel with the part that rounding took from the first: bfloat16 alone would
    cost 0.4% of the bias.
    """
    high = bias.to(k.dtype)
    parts = [high]
    if k.dtype.itemsize == 2:
        parts.append((bias - high.to(bias.dtype)).to(k.dtype))
    return torch.stack(parts, dim=-1)[:, None].expand(-1, k.shape[1], -1, -1)


class ResidualProjection(nn.Linear):
    """A linear layer whose output is added to the residual stream: initialised smaller."""


class StreamAttention(nn.Module):
    """Multi-head attention among streams, attenuated by their log scores."""

    def __init__(self, config: ThoughtbubblesConfig) -> None:
        super().__init__()
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads = [heads, groups, groups]
        self.rule = config.attenuation
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.heads) * size, bias=config.has_bias("attention"))
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        self.o_proj = ResidualProjection(heads * size, config.hidden_size, bias=config.has_bias("attention_output"))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        log_score: Tensor | None,
        memory: AttentionMemory | None = None,
        placement: Placement | None = None,
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]; the others as in `rotate` and `attenuated_attention`."""
        out = attenuated_attention(*self.project(x, cos, sin), log_score, self.rule, memory, placement)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, D] -> queries [B, H, N, K], keys and values [B, G, N, K], rotated."""
        heads = self.qkv_proj(x).unflatten(-1, (sum(self.heads), -1)).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v
