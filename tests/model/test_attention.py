"""Rotary embedding and attenuated attention (method: Positions, Attenuation)."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import random_ids, tiny_model
from thoughtbubbles.model.attention import attenuate, attenuated_attention, rotary_angles, rotate

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


def random_inputs(streams: int, head_size: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v [2, 3, N, K] and log scores [2, N] as after three fork layers."""
    generator = torch.Generator().manual_seed(streams)
    q, k, v = (torch.randn(2, 3, streams, head_size, generator=generator).to(dtype) for _ in range(3))
    return q, k, v, -4 * torch.rand(2, streams, generator=generator)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, log_score: Tensor, rule: str) -> Tensor:
    """Attenuated attention (method: Attenuation) with the matrix of all logits, in float64."""
    q, k, v, log_score = (x.double() for x in (q, k, v, log_score))
    if rule == "released":
        q, k = q.clone(), k.clone()
        q[..., -1] = 1
        k[..., -1] = log_score[:, None]
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if rule == "paper":
        logits = logits + log_score[:, None, None]
    if rule != "none":
        v = v * log_score.exp()[:, None, :, None]
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1) @ v


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


# --- Rotary embedding ---


def test_rotation_pairs_channel_j_with_j_plus_half() -> None:
    positions = torch.tensor([[0.5, 3.25]], dtype=torch.float64)
    x = torch.randn(1, 1, 2, 6, dtype=torch.float64)
    turned = rotate(x, *rotary_angles(positions, 6, 100.0))
    for n, position in enumerate(positions[0].tolist()):
        for j in range(3):
            angle = position * 100.0 ** (-2 * j / 6)
            a, b = x[0, 0, n, j].item(), x[0, 0, n, j + 3].item()
            assert turned[0, 0, n, j].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-12)
            assert turned[0, 0, n, j + 3].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-12)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(at: float, other: float) -> float:
        angles = [rotary_angles(torch.tensor([[p]], dtype=torch.float64), 8, 10000.0) for p in (at, other)]
        return (rotate(q, *angles[0]) * rotate(k, *angles[1])).sum().item()

    assert product(7.5, 3.25) == pytest.approx(product(104.5, 100.25), abs=1e-9)
    assert abs(product(7.5, 3.25) - product(7.5, 3.5)) > 1e-3


def test_angles_are_float32_for_a_bfloat16_model() -> None:
    positions = torch.tensor([[1000 + 1 / 3]])
    cos, _ = rotary_angles(positions, 8, 10000.0)
    assert cos.dtype == torch.float32
    assert cos[0, 0, 0, 0].item() == pytest.approx(math.cos(1000 + 1 / 3), abs=1e-4)
    assert rotate(torch.ones(1, 1, 1, 8, dtype=torch.bfloat16), cos, cos).dtype == torch.bfloat16


# --- Attention against the naive one ---


@pytest.mark.parametrize("streams", [1, 2, 5, 31, 67])
@pytest.mark.parametrize("rule", ["paper", "released", "none"])
def test_attention_equals_naive_softmax(rule: str, streams: int) -> None:
    q, k, v, log_score = random_inputs(streams)
    out = attenuated_attention(q, k, v, None if rule == "none" else log_score, rule)
    assert torch.allclose(out.double(), naive_attention(q, k, v, log_score, rule), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_gradients_of_attention_equal_those_of_naive_softmax(rule: str) -> None:
    q, k, v, log_score = inputs = [x.requires_grad_() for x in random_inputs(13)]
    weights = torch.randn(2, 3, 13, 8)
    (attenuated_attention(q, k, v, log_score, rule) * weights).sum().backward()
    gradients = [x.grad for x in inputs]
    q, k, v, log_score = leaves = [x.detach().double().requires_grad_() for x in inputs]
    (naive_attention(q, k, v, log_score, rule) * weights).sum().backward()
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient is not None
        assert leaf.grad is not None
        assert relative_error(gradient, leaf.grad) < 1e-5


def test_no_scores_means_scores_of_zero() -> None:
    q, k, v, log_score = random_inputs(9)
    zero = torch.zeros_like(log_score)
    plain = attenuated_attention(q, k, v, None, "paper")
    assert torch.allclose(plain, attenuated_attention(q, k, v, zero, "paper"), rtol=0, atol=1e-6)


def test_released_rule_gives_up_a_channel_even_for_scores_of_zero() -> None:
    q, k, v, log_score = random_inputs(9)
    zero = torch.zeros_like(log_score)
    assert not torch.allclose(
        attenuated_attention(q, k, v, None, "released"), attenuated_attention(q, k, v, zero, "released")
    )


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_a_key_of_score_minus_sixty_is_as_good_as_absent(rule: str) -> None:
    q, k, v, log_score = random_inputs(6)
    log_score[:, 2] = -60
    changed = v.clone()
    changed[:, :, 2] = 100
    assert torch.equal(
        attenuated_attention(q, k, v, log_score, rule), attenuated_attention(q, k, changed, log_score, rule)
    )


def with_one_bias_channel(q: Tensor, k: Tensor, v: Tensor, log_score: Tensor) -> Tensor:
    """The paper's rule with the whole bias in a single channel of the keys' own type."""
    scale = 1 / math.sqrt(q.shape[-1])
    bias = (log_score / scale).to(k.dtype)[:, None, :, None].expand(-1, k.shape[1], -1, -1)
    v = v * log_score.exp().to(v.dtype)[:, None, :, None]
    q, k = torch.cat([q, torch.ones_like(bias)], -1), torch.cat([k, bias], -1)
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 1)), is_causal=True, scale=scale)[..., :-1]


@pytest.fixture
def channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of GPUs, on a CPU too."""
    monkeypatch.setattr("thoughtbubbles.model.attention.suits", lambda q: False)


@pytest.mark.usefixtures("channels")
def test_bfloat16_bias_takes_two_channels() -> None:
    """Measured, in norm: 0.003 with two channels (rounding of values and output), 0.05 with one."""
    q, k, v, _ = random_inputs(64, 64, torch.bfloat16)
    log_score = -40 + 3 * torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    expected = naive_attention(q, k, v, log_score, "paper")
    error = relative_error(attenuated_attention(q, k, v, log_score, "paper"), expected)
    assert error < 0.004
    assert relative_error(with_one_bias_channel(q, k, v, log_score), expected) > 8 * error


# --- Memory ---


class Recorder(TorchDispatchMode):
    """Records every operator and the numbers in the largest tensor that any returned."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.add(func.name())
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


def record(work: Callable[[], Tensor]) -> Recorder:
    """Run forward and backward under a recorder."""
    recorder = Recorder()
    with recorder:
        work().sum().backward()
    return recorder


@pytest.mark.parametrize("rule", ["paper", "released", "none"])
def test_whole_row_attention_makes_no_matrix_of_streams_by_streams(rule: str) -> None:
    streams = 512
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, streams, 8, generator=generator).requires_grad_() for _ in range(3))
    log_score = None if rule == "none" else (-torch.rand(1, streams, generator=generator)).requires_grad_()
    recorder = record(lambda: attenuated_attention(q, k, v, log_score, rule))
    assert recorder.largest <= streams * 3 * 10
    assert FUSED in recorder.operators
    assert f"{FUSED}_backward" in recorder.operators


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_whole_model_makes_no_matrix_of_streams_by_streams(rule: str) -> None:
    model = tiny_model(attenuation=rule, budget=2).train()
    ids = random_ids(1, 256)
    recorder = record(lambda: model(ids, labels=ids).loss)
    assert recorder.largest < 512 * 512 / 4
    assert FUSED in recorder.operators


def test_recorder_sees_such_a_matrix() -> None:
    q, k, v, log_score = (x.requires_grad_() for x in random_inputs(64))
    assert record(lambda: naive_attention(q, k, v, log_score, "paper")).largest >= 64 * 64


def test_fused_kernel_agrees_with_the_unfused_one() -> None:
    q, k, v, log_score = random_inputs(33)
    fused = attenuated_attention(q, k, v, log_score, "paper")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        unfused = attenuated_attention(q, k, v, log_score, "paper")
    assert torch.allclose(fused, unfused, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("channels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths_that_kernels_want_change_no_result(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, log_score = random_inputs(9, dtype=dtype)
    widths: list[int] = []
    fused, scale = F.scaled_dot_product_attention, q.shape[-1] ** -0.5

    def watch(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        widths.extend(x.shape[-1] for x in (q, k, v))
        return fused(q, k, v, **arguments)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    found = attenuated_attention(q, k, v, log_score, "paper")
    narrow = attenuate(q, k, v, log_score, "paper", scale, cached=True)
    plain = fused(*narrow, is_causal=True, scale=scale)[..., : q.shape[-1]]
    assert torch.allclose(found, plain, atol=1e-6, rtol=0)
    assert widths == [16, 16, 16]
    assert narrow[1].shape[-1] == q.shape[-1] + (2 if dtype == torch.bfloat16 else 1)
