"""Rotary embedding and attenuated attention (method: Positions, Attenuation)."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from tests.helpers import ROPES, random_ids, tiny_model
from thoughtbubbles.model.attention import attenuate, attenuated_attention, rotary_angles, rotate, shares_keys
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.reference import rotary_frequencies
from thoughtbubbles.model.rotary import Rotary

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


def rotary(head_dim: int, theta: float = 10000.0, **fields: Any) -> Rotary:
    return Rotary(ThoughtbubblesConfig(head_dim=head_dim, rope_theta=theta, **fields))


def test_rotation_pairs_channel_j_with_j_plus_half() -> None:
    positions = torch.tensor([[0.5, 3.25]], dtype=torch.float64)
    x = torch.randn(1, 1, 2, 6, dtype=torch.float64)
    turned = rotate(x, *rotary_angles(positions, rotary(6, 100.0)))
    for n, position in enumerate(positions[0].tolist()):
        for j in range(3):
            angle = position * 100.0 ** (-2 * j / 6)
            a, b = x[0, 0, n, j].item(), x[0, 0, n, j + 3].item()
            assert turned[0, 0, n, j].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-12)
            assert turned[0, 0, n, j + 3].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-12)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(at: float, other: float) -> float:
        angles = [rotary_angles(torch.tensor([[p]], dtype=torch.float64), rotary(8)) for p in (at, other)]
        return (rotate(q, *angles[0]) * rotate(k, *angles[1])).sum().item()

    assert product(7.5, 3.25) == pytest.approx(product(104.5, 100.25), abs=1e-9)
    assert abs(product(7.5, 3.25) - product(7.5, 3.5)) > 1e-3


def test_angles_are_float32_for_a_bfloat16_model() -> None:
    positions = torch.tensor([[1000 + 1 / 3]])
    cos, _ = rotary_angles(positions, rotary(8))
    assert cos.dtype == torch.float32
    assert cos[0, 0, 0, 0].item() == pytest.approx(math.cos(1000 + 1 / 3), abs=1e-4)
    assert rotate(torch.ones(1, 1, 1, 8, dtype=torch.bfloat16), cos, cos).dtype == torch.bfloat16


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 1.0])
def test_a_part_of_a_head_turns_as_a_gpt_neox_turns_it(share: float) -> None:
    """Of 12 channels 40% are 4.8, of which 4 turn, and 25% are 3, which turn with a fourth."""
    theirs: Any = GPTNeoXConfig(
        hidden_size=24, num_attention_heads=2, rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": share}
    )
    x, positions = torch.randn(1, 2, 7, 12), torch.arange(7)[None]
    expected, _ = modeling_gpt_neox.apply_rotary_pos_emb(
        x, x, *modeling_gpt_neox.GPTNeoXRotaryEmbedding(theirs)(x, positions)
    )
    angles = rotary_angles(positions.float(), rotary(12, 500.0, partial_rotary_factor=share))
    assert torch.allclose(rotate(x, *angles), expected, rtol=0, atol=1e-6)
    turned = {0.25: 4, 0.4: 4, 0.5: 6, 1.0: 12}[share]
    assert torch.equal(rotate(x, *angles)[..., turned:], x[..., turned:])


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("meta", [False, True], ids=["", "made on the meta device"])
def test_angles_are_those_of_transformers(rope: dict[str, Any], meta: bool) -> None:
    """To the bit, thousands of tokens on: a last bit of a frequency is 4e-4 there."""
    whole: Any = {**rope, "rope_theta": 5e5}
    theirs = LlamaConfig(
        hidden_size=768,
        num_attention_heads=12,
        max_position_embeddings=4096,
        rope_parameters=whole,
    )
    positions = torch.arange(4000, 4096)[None]
    cos, sin = modeling_llama.LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions)
    with torch.device("meta" if meta else "cpu"):
        ours = rotary(64, 5e5, rope_parameters=rope, max_position_embeddings=4096)
    for found, expected in zip(rotary_angles(positions.float(), ours), (cos, sin), strict=True):
        assert torch.equal(found[0, 0], expected[0, :, :32])


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_frequencies_are_those_of_the_reference(rope: dict[str, Any], share: float) -> None:
    config = ThoughtbubblesConfig(head_dim=26, rope_theta=50.0, rope_parameters=rope, partial_rotary_factor=share)
    expected, factor = rotary_frequencies(config)
    found = Rotary(config).frequencies(torch.device("cpu"), torch.float64)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert Rotary(config).factor == pytest.approx(factor, rel=1e-12)


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


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("copying", [False, True], ids=["", "a kernel that shares no keys"])
@pytest.mark.parametrize("rule", ["paper", "released", "none"])
def test_heads_that_share_keys_are_heads_with_equal_keys(
    rule: str, copying: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if copying:
        monkeypatch.setattr("thoughtbubbles.model.attention.shares_keys", lambda device, itemsize: False)
    q, k, v = (torch.randn(2, heads, 13, 8).requires_grad_() for heads in (6, groups, groups))
    log_score = (-3 * torch.rand(2, 13)).requires_grad_()
    weights = torch.randn(2, 6, 13, 8)
    out = attenuated_attention(q, k, v, None if rule == "none" else log_score, rule)
    gradients = torch.autograd.grad((out * weights).sum(), (q, k, v))
    keys, values = (x.double().repeat_interleave(6 // groups, dim=1) for x in (k, v))
    expected = naive_attention(q.double(), keys, values, log_score.double(), rule)
    assert torch.allclose(out.double(), expected, rtol=0, atol=1e-5)
    for found, gradient in zip(gradients, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        assert relative_error(found, gradient.double()) < 1e-5


def test_which_kernels_let_heads_share_keys() -> None:
    kinds = [(device, itemsize) for device in ("cpu", "cuda") for itemsize in (2, 4, 8)]
    assert [kind for kind in kinds if not shares_keys(*kind)] == [("cuda", 4), ("cuda", 8)]


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
