"""Ways to attend causally with a bias of the key, forward and backward, beside plain causal attention.

The bias rides in an appended channel of queries and keys through each of PyTorch's fused kernels, or is added by
FlexAttention, or by products of blocks. Errors are those of output and gradients in bfloat16 against float64.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpu_parts.driver import Item, Setting, run_part
from gpu_parts.facts import seconds_of
from thoughtbubbles.model.attention import attenuate
from thoughtbubbles.model.blocked_attention import blocked_attention

HEADS = (64, 80, 128)
LENGTHS = (2048, 1024, 4096, 8192)
STREAMS, CHANNELS = 1 << 14, 2048
"""Of all rows together, and of all heads."""
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def items(setting: Setting) -> Iterator[Item]:
    """A head size and length each; FlexAttention, which is compiled for each, after the others."""
    heads, lengths = ((16,), (128,)) if setting.rehearse else (HEADS, LENGTHS)
    shapes = [(head, length) for length in lengths for head in heads]
    for head, length in shapes:
        yield Item(f"error, head {head}, N {length}", 1, partial(errors, setting, head, min(length, 1024)))
        yield Item(f"head {head}, N {length}", 1.5, partial(times, setting, head, length))
    for head, length in shapes:
        yield Item(f"flex, head {head}, N {length}", 10, partial(times, setting, head, length, ("flex",)))


def ways(head: int) -> dict[str, Attend]:
    """The ways by name; q, k and v [B, H, N, K], bias [B, N] in float32."""
    scale = 1 / math.sqrt(head)

    def plain(q: Tensor, k: Tensor, v: Tensor, _bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    def channel(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return plain(*attenuate(q, k, v, bias, "paper", scale), bias)[..., :head]

    def blocks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return blocked_attention(q, k, v * bias.exp().to(v.dtype)[:, None, :, None], bias, scale)

    def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        v = v * bias.exp().to(v.dtype)[:, None, :, None]
        mask = mask_of(q.shape[2], q.device.type)
        out: Tensor = compiled_flex()(
            q, k, v, score_mod=lambda score, b, _h, _q, key: score + bias[b, key], block_mask=mask, scale=scale
        )
        return out

    kernels = {f"channel, {name}": partial(channel, kernel) for name, kernel in KERNELS.items()}
    return {"plain": plain, **kernels, "blocks": blocks, "flex": flex}


@cache
def compiled_flex() -> Any:
    """FlexAttention as it is meant to be used."""
    return torch.compile(flex_attention, dynamic=False)


@cache
def mask_of(length: int, device: str) -> Any:
    """The blocks that causal attention has."""
    return create_block_mask(lambda _b, _h, query, key: query >= key, None, None, length, length, device=device)


def times(setting: Setting, head: int, length: int, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Seconds of each way, forward and backward, and how many times the plain one's; or why it cannot be had."""
    rows, heads = (1, 2) if setting.rehearse else (max(1, STREAMS // length), CHANNELS // head)
    inputs = draw(setting.device, (rows, heads, length, head))
    found: dict[str, Any] = {"rows": rows, "heads": heads}
    chosen = ways(head)
    for name in ("plain", *(names or [name for name in chosen if name not in ("plain", "flex")])):
        try:
            taken = seconds_of(setting.device, partial(forward_and_backward, chosen[name], inputs), rounds=5)
        except (RuntimeError, NotImplementedError) as error:
            found[name] = {"cannot": str(error).splitlines()[0][:200]}
            continue
        plain = found["plain"]["seconds"] if name != "plain" else taken
        found[name] = {"seconds": taken, "times_plain": taken / plain}
    return found


def errors(setting: Setting, head: int, length: int) -> dict[str, Any]:
    """||difference|| / ||expected|| of output and gradients of each way against float64."""
    inputs = draw(setting.device, (1, 2, length, head))
    expected = forward_and_backward(exact, tuple(each.detach().double().requires_grad_() for each in inputs))
    found: dict[str, Any] = {}
    for name, way in ways(head).items():
        if name in ("plain", "flex"):
            continue
        try:
            ours = forward_and_backward(way, inputs)
        except (RuntimeError, NotImplementedError) as error:
            found[name] = {"cannot": str(error).splitlines()[0][:200]}
            continue
        labels = ("output", "q", "k", "v", "bias")
        found[name] = {
            label: ((a.double() - e).norm() / e.norm()).item()
            for label, a, e in zip(labels, ours, expected, strict=True)
        }
    return found


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """With the whole square, in the type of its inputs."""
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias[:, None, None]
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ (v * bias.exp()[:, None, :, None])


def draw(device: str, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """q, k, v in bfloat16 and log scores in float32."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    return q, k, v, (-2 * torch.rand(shape[0], shape[2], device=device)).requires_grad_()


def forward_and_backward(way: Attend, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output, and the gradients of its sum weighted by 1 to N."""
    out = way(*inputs)
    weights = torch.linspace(0, 1, out.shape[2], device=out.device, dtype=out.dtype)[:, None].expand_as(out)
    wanted = [each for each in inputs if each.requires_grad]
    gradients = torch.autograd.grad(out, wanted, weights, allow_unused=True)
    return out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True))


if __name__ == "__main__":
    run_part("attention", items, __doc__)
