"""Attention in blocks, for bfloat16 on CPUs (method: Attenuation)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import random_ids, tiny_model
from tests.model.test_attention import naive_attention, random_inputs, relative_error
from thoughtbubbles.model import blocked_attention as module
from thoughtbubbles.model.attention import attenuated_attention
from thoughtbubbles.model.blocked_attention import blocked_attention


def naive(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    logits = scale * q @ k.mT + bias[:, None, None]
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1) @ v


def leaves(*values: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [value.detach().to(dtype).requires_grad_() for value in values]


def call(function: Callable[..., Tensor], inputs: Sequence[Tensor], last: float | str) -> Tensor:
    return function(*inputs, last)


@pytest.mark.parametrize("streams", [1, 2, 63, 64, 65, 129, 200])
def test_outputs_and_gradients_equal_those_of_naive_softmax(streams: int) -> None:
    inputs = leaves(*random_inputs(streams))
    weights = torch.randn(inputs[0].shape, dtype=torch.float64)
    found, expected = (call(f, inputs, 0.3) for f in (blocked_attention, naive))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for ours, theirs in zip(
        *(torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("streams", [1, 65, 130])
def test_heads_that_share_keys_are_heads_with_equal_keys(streams: int) -> None:
    sizes = (6, 2, 2)
    q, k, v = (torch.randn(2, heads, streams, 8, dtype=torch.float64).requires_grad_() for heads in sizes)
    bias = torch.randn(2, streams, dtype=torch.float64).requires_grad_()
    weights = torch.randn(2, 6, streams, 8, dtype=torch.float64)
    shared = blocked_attention(q, k, v, bias, 0.3)
    apart = naive(q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1), bias, 0.3)
    torch.testing.assert_close(shared, apart, atol=1e-12, rtol=0)
    for ours, theirs in zip(
        *(torch.autograd.grad((out * weights).sum(), (q, k, v, bias)) for out in (shared, apart)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("scores", [1, 4_000])
def test_few_rows_of_the_batch_at_a_time(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = leaves(
        *(
            x[:1].repeat(5, *[1] * (x.dim() - 1)) * torch.arange(1, 6).view(5, *[1] * (x.dim() - 1))
            for x in random_inputs(9)
        )
    )
    expected = call(blocked_attention, inputs, 0.3)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    monkeypatch.setattr(module, "SCORES", scores)
    found = call(blocked_attention, inputs, 0.3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), inputs), gradients)


def test_no_bias_is_a_bias_of_zero() -> None:
    q, k, v, bias = leaves(*random_inputs(70))
    assert torch.equal(blocked_attention(q, k, v, None, 0.3), blocked_attention(q, k, v, torch.zeros_like(bias), 0.3))


@pytest.mark.parametrize("rule", ["paper", "released"])
@pytest.mark.parametrize("streams", [5, 100])
def test_bfloat16_on_a_cpu_goes_this_way(rule: str, streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(module._BlockedAttention, "apply", recorded(module._BlockedAttention.apply, calls))
    inputs = [
        *leaves(*random_inputs(streams, 32)[:3], dtype=torch.bfloat16),
        *leaves(random_inputs(streams)[3], dtype=torch.float32),
    ]
    found = call(attenuated_attention, inputs, rule)
    assert len(calls) == 1
    assert relative_error(found, call(naive_attention, inputs, rule)) < 0.01
    gradients = torch.autograd.grad(found.float().square().sum(), inputs)
    expected = torch.autograd.grad(call(naive_attention, inputs, rule).square().sum(), inputs)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert relative_error(ours, theirs.double()) < 0.03


@torch.no_grad()
def test_without_a_backward_pass_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(module._BlockedAttention, "apply", recorded(module._BlockedAttention.apply, calls))
    call(attenuated_attention, [x.bfloat16() for x in random_inputs(9)], "paper")
    assert not calls


def test_float32_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(module._BlockedAttention, "apply", recorded(module._BlockedAttention.apply, calls))
    call(attenuated_attention, random_inputs(9), "paper")
    assert not calls


def recorded(function: Any, calls: list[Any]) -> Any:
    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    return call


def test_memory_is_linear_in_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more scores are held at a time than of one block of queries."""
    sizes: list[int] = []
    weights = module._weights

    def measured(*arguments: Any) -> Tensor:
        made = weights(*arguments)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(module, "_weights", measured)
    monkeypatch.setattr(module, "SCORES", 1)
    largest = []
    for streams in (256, 512):
        sizes.clear()
        call(blocked_attention, leaves(*random_inputs(streams)), 0.3).sum().backward()
        largest.append(max(sizes))
    assert largest == [module.QUERIES * 256, module.QUERIES * 512]


@pytest.mark.parametrize("routing", ["none", "causal", "topk"])
def test_a_model_under_autocast_is_near_one_in_float32(routing: str) -> None:
    model, ids = tiny_model(routing=routing).float(), random_ids(2, 33)
    expected = model(ids, labels=ids, budget=1).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, budget=1).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    assert all(math.isfinite(p.grad.norm()) for p in model.parameters() if p.grad is not None)
