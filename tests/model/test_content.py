"""Forks that attend for what they bring along (method: Gate)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import (
    LLAMA,
    NEOX,
    ROPES,
    Case,
    case_id,
    compare_with_reference,
    padding_mask,
    put_at,
    random_ids,
    randomise,
    survivors_of,
    tiny_config,
    tiny_model,
)
from tests.model.test_attention import naive_attention, relative_error
from tests.model.test_gate import ALL, entering, random_gate
from tests.model.test_modeling import trained_once
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.model import blocked_attention
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.content import FORK_CHANNELS
from thoughtbubbles.model.gate import ForkGate
from thoughtbubbles.model.reference import reference_forward
from thoughtbubbles.model.streams import Streams

ATTENDED: Case = {"fork_content": "attended"}
ATTENUATIONS = ["paper", "released", "none"]


def gate_before(layer: int, **rules: Any) -> ForkGate:
    gate = ForkGate(tiny_config(**ATTENDED, **rules), layer)
    randomise(gate, seed=1)
    return gate.double()


def half_scored() -> Streams:
    """[2, 10] streams of 5 tokens with scores of their own; the second row lacks its last two tokens."""
    streams: Streams = random_gate().double()(entering(dtype=torch.float64), ALL)
    return streams


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, N, 64] turned as complex numbers, channel j with j + 32."""
    angles = positions[..., None] * 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    pairs = torch.complex(x[..., :32], x[..., 32:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
def test_what_a_fork_brings_along_by_hand(attenuation: str) -> None:
    """Of each source, what one head sees at or left of it, before routing."""
    gate, streams = gate_before(2, attenuation=attenuation), half_scored()
    content = gate.content
    assert content is not None
    out = gate(streams, ALL)
    x = streams.residual
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    q, k, v = ((normed * content.norm.weight + content.norm.bias) @ content.qkv.weight.T).chunk(3, -1)
    # Both streams of token t stand at t - 1/2 and t.
    positions = torch.arange(10, dtype=torch.float64).expand(2, -1) / 2 - 0.5 + (attenuation == "released")
    q, k = turned(q, positions), turned(k, positions)
    seen = naive_attention(q[:, None], k[:, None], v[:, None], streams.log_score, attenuation)[:, 0]
    added = gate.fork_embedding + seen @ content.output.weight.T
    assert out.origin is not None
    assert added.std() > 0.5
    for row, alive in enumerate(streams.alive.sum(1).tolist()):
        for slot, origin in enumerate(out.origin[row, : 2 * alive].tolist()):
            expected = x[row, origin // 2] + (added[row, origin // 2] if origin % 2 == 0 else 0)
            assert torch.allclose(out.residual[row, slot], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
def test_nobody_reads_a_dead_slot(attenuation: str) -> None:
    gate, streams = gate_before(2, attenuation=attenuation), half_scored()
    dead = ~streams.alive[..., None]
    poisoned = streams.residual.detach().masked_fill(dead, 1e3).requires_grad_()
    found, expected = gate(streams.with_residual(poisoned), ALL), gate(streams, ALL)
    assert torch.equal(found.residual, expected.residual)
    found.residual.sum().backward()
    assert poisoned.grad is not None
    assert not poisoned.grad[dead.expand_as(poisoned)].any()


def test_by_default_nothing_is_there() -> None:
    plain, attended = tiny_model(), tiny_model(**ATTENDED)
    names = [f"model.gates.{layer}.content.{part}" for layer in (1, 2) for part in ("norm.bias", "norm.weight")]
    names += [f"model.gates.{layer}.content.{part}.weight" for layer in (1, 2) for part in ("qkv", "output")]
    assert sorted(attended.state_dict().keys() - plain.state_dict().keys()) == sorted(names)
    assert plain.state_dict().keys() < attended.state_dict().keys()
    assert not tiny_model(routing="none", **ATTENDED).model.gates


def test_initial_weights_are_those_of_any_attention() -> None:
    torch.manual_seed(0)
    shape: Case = {"hidden_size": 256, "num_attention_heads": 4, "initializer_range": 0.05}
    for gate in ThoughtbubblesForCausalLM(tiny_config(**shape, **ATTENDED)).model.gates.values():
        assert gate.content.qkv.weight.std().item() == pytest.approx(0.05, rel=0.03)
        assert gate.content.output.weight.std().item() == pytest.approx(0.05 / math.sqrt(2 * 4), rel=0.03)
        assert (gate.content.norm.weight == 1).all()
        assert not gate.content.norm.bias.any()
        assert gate.content.qkv.bias is gate.content.output.bias is None


# --- Against the reference ---

EXACT: list[Case] = [
    {"budget": 1.5, "length": 9, "padding": "left"},
    {"budget": 3.25, "length": 7, "padding": "right", "attenuation": "released", "fork_layers": [0, 1, 3]},
    {"budget": 1.2, "length": 11, "padding": "holes", "attenuation": "none", "merge": "residual-normed"},
    {"budget": 4, "length": 5, "padding": "none", "merge": "probability", "fork_layers": [0, 2]},
    {"budget": 2, "length": 7, "padding": "left", "gate_scores": "fixed", "fork_embedding": "relative"},
    {"budget": 1.5, "length": 7, "padding": "right", "gate_scores": "forks", "gate_start": 0.2, "routing": "threshold"},
    {"budget": 2.5, "length": 9, "padding": "holes", "routing": "topk", "attenuation": "released", "merge": "root"},
    {"budget": 1.5, "length": 9, "padding": "left", "routing": "random", "use_bias": False, "rope_theta": 7.0},
    {"budget": 2, "length": 9, "padding": "left", **LLAMA},
    {"budget": 2, "length": 9, "padding": "right", **NEOX},
    {"budget": 1, "length": 5, "padding": "left"},
    {"budget": 2, "length": 1, "padding": "none"},
]


@pytest.mark.parametrize("case", EXACT, ids=case_id)
def test_float64_model_equals_the_reference_to_the_last_digits(case: Case) -> None:
    rules = {name: value for name, value in case.items() if name not in ("length", "padding")}
    model, ids = tiny_model(5, **ATTENDED, **rules).double(), random_ids(3, case["length"])
    agreement = compare_with_reference(model, ids, padding_mask(case["padding"], *ids.shape))
    assert agreement.flips == 0
    assert agreement.logits < 1e-9
    assert max(agreement.gradients.values()) < 1e-6, agreement.gradients


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_scaled_frequencies_equal_the_reference(rope: Case) -> None:
    """Of all 64 channels, whatever share of a block's heads turns."""
    fields: Case = {"rope_parameters": rope, "partial_rotary_factor": 0.5, "budget": 2, "max_position_embeddings": 64}
    agreement = compare_with_reference(tiny_model(5, **ATTENDED, **fields), random_ids(3, 23))
    assert agreement.logits < 1e-4
    assert max(agreement.gradients.values()) < 1e-3, agreement.gradients


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
def test_every_gate_learns_from_what_forks_bring_along(attenuation: str) -> None:
    """The first layer's too, whose forks the second layer's read."""
    model, ids = tiny_model(attenuation=attenuation, **ATTENDED), random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.model.gates.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-8, name


def test_reference_alone_chooses_the_same_survivors() -> None:
    model, ids = tiny_model(5, budget=1.5, **ATTENDED).double(), random_ids(3, 9)
    mask = padding_mask("holes", 3, 9)
    out = model(ids, attention_mask=mask, output_streams=True)
    forks = reference_forward(model.config, model.state_dict(), ids, mask).forks
    chosen = [{layer: fork.survivors for layer, fork in row.items()} for row in forks]
    assert survivors_of(out.streams, model.config.gated_layers) == chosen


def test_comparison_notices_another_head() -> None:
    for part in ("norm", "qkv", "output"):
        model = tiny_model(fork_layers=[2], **ATTENDED).double()
        module = getattr(model.model.gates["2"].content, part)
        module.register_forward_hook(lambda _module, _inputs, out: 1.01 * out)
        assert compare_with_reference(model, random_ids(2, 9)).logits > 1e-6


# --- Causality, padding, rows ---


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
def test_changed_suffix_leaves_the_same_bits_before_it(attenuation: str) -> None:
    model, ids = tiny_model(attenuation=attenuation, budget=2, **ATTENDED), random_ids(2, 48)
    changed = torch.cat([ids[:, :17], random_ids(2, 31, seed=9)], dim=1)
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.equal(before[:, 17:], after[:, 17:])


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
@pytest.mark.parametrize("place", [range(6, 13), range(7), range(3, 10), (0, 1, 4, 6, 7, 11, 12)], ids=str)
def test_padding_does_not_matter(place: Any, attenuation: str) -> None:
    model, ids = tiny_model(budget=1.5, attenuation=attenuation, **ATTENDED).double(), random_ids(1, 7)
    padded, mask = put_at(ids[0], place, 13, filler=4)
    found = model(padded, attention_mask=mask).logits
    assert torch.allclose(found[:, list(place)], model(ids).logits, rtol=0, atol=1e-10)
    assert found.isfinite().all()


def test_a_budget_of_one_has_nothing_to_bring_along() -> None:
    """And yet a gradient of 0 for all, which processes that share gradients wait for."""
    model, ids = tiny_model(budget=1, **ATTENDED), random_ids(2, 9)
    out = model(ids, labels=ids)
    out.loss.backward()
    for gate in model.model.gates.values():
        for parameter in gate.content.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()
            parameter.data.normal_()
    assert torch.equal(model(ids).logits, out.logits)
    assert not torch.allclose(model(ids, budget=2).logits, out.logits, atol=1e-3)


# --- Decoding ---


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
@pytest.mark.parametrize("fields", [{}, {"fork_layers": [0, 2]}, LLAMA, {"merge": "probability"}], ids=str)
def test_each_step_gives_the_logits_of_the_full_forward(fields: Case, attenuation: str) -> None:
    model = tiny_model(attenuation=attenuation, **{"budget": 2, **fields}, **ATTENDED).double()
    for rows in (1, 4):
        ids, mask = random_ids(rows, 17), padding_mask("holes", rows, 17)
        assert mask is not None
        for chunks in ([17], [1] * 17, [5, 1, 1, 7, 3]):
            cache, logits, end = StreamCache(), [], 0
            with torch.no_grad():
                full = model(ids, attention_mask=mask).logits
                for columns in ids.split(chunks, dim=1):
                    end += columns.shape[1]
                    logits.append(model(columns, attention_mask=mask[:, :end], cache=cache).logits)
            assert torch.allclose(torch.cat(logits, 1)[mask.bool()], full[mask.bool()], rtol=0, atol=1e-10)
            memory = cache.attended[model.config.gated_layers[-1]]
            assert memory.lengths == cache.attention[model.config.gated_layers[-1] - 1].lengths


def test_generation_is_the_same_with_and_without_the_cache() -> None:
    model: Any = tiny_model(budget=2, **ATTENDED).double()
    ids, mask = random_ids(3, 8), torch.ones(3, 8, dtype=torch.int64)
    mask[0, :3] = 0
    for arguments in ({}, {"num_beams": 3}):
        common: Any = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, **arguments}
        assert torch.equal(model.generate(ids, **common), model.generate(ids, use_cache=False, **common))


def test_a_reset_cache_forgets_what_was_attended() -> None:
    model, cache = tiny_model(**ATTENDED), StreamCache()
    with torch.no_grad():
        model(random_ids(2, 9), cache=cache)
        cache.reset()
        assert (cache.attended, cache.nbytes) == ({}, 0)
        tiny_model()(random_ids(2, 9), cache=cache)
    assert cache.attended == {}


# --- Number types ---


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The queries that attention in blocks was considered for."""
    seen: list[Tensor] = []

    def suits(q: Tensor) -> bool:
        seen.append(q)
        return blocked_attention.suits(q)

    monkeypatch.setattr("thoughtbubbles.model.attention.suits", suits)
    return seen


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_near_float32(autocast: bool, attenuation: str, asked: list[Tensor]) -> None:
    """All candidates survive, so that survivors do not depend on scores. Measured, in norm: at most 1.1%."""
    for seed in range(4):
        model, ids = tiny_model(seed, attenuation=attenuation, budget=4, **ATTENDED), random_ids(3, 17, seed)
        mask = padding_mask("left", 3, 17)
        assert mask is not None
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        asked.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = (model if autocast else model.to(torch.bfloat16))(ids, attention_mask=mask, labels=ids)
        heads = [q for q in asked if q.shape[1] == 1]
        assert [blocked_attention.suits(q) for q in heads] == [True, True]
        out.loss.backward()
        assert relative_error(out.logits[mask.bool()].detach(), expected.detach().double()) < 0.02
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_scores_far_below_zero_are_precise_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a fused kernel, whose key has a channel for the part of the score that rounding takes."""
    gate, streams = gate_before(2), half_scored()
    assert gate.content is not None
    low = Streams(**{**vars(streams), "log_score": streams.log_score - 37.3 + torch.rand(2, 10).cumsum(1)})
    expected = gate.content.attend(low)
    monkeypatch.setattr("thoughtbubbles.model.attention.suits", lambda q: False)
    gate.content.to(torch.bfloat16)
    found = gate.content.attend(low.with_residual(low.residual.to(torch.bfloat16)))
    assert found.dtype == torch.bfloat16
    size = expected.detach().norm(dim=-1, keepdim=True)  # which scores drive over orders of magnitude
    assert relative_error((found / size)[low.alive].detach(), (expected / size)[low.alive].detach()) < 0.02


# --- Training ---


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_nothing(dropout: float) -> None:
    model, ids = tiny_model(hidden_dropout=dropout, budget=1.5, **ATTENDED).train(), random_ids(3, 13)
    loss, streams, gradients = trained_once(model, ids)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    loss_again, streams_again, gradients_again = trained_once(model, ids)
    assert torch.equal(loss, loss_again)
    assert survivors_of(streams, [1, 2]) == survivors_of(streams_again, [1, 2])
    assert gradients.keys() == gradients_again.keys() > {"model.gates.1.content.qkv.weight"}
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_dropout_of_what_is_brought_along_works_in_training_alone() -> None:
    gate, streams = gate_before(2, hidden_dropout=0.5), half_scored()
    content = gate.content
    assert content is not None
    attended = content.attend(streams)
    dropped = content.project(attended) == 0
    assert 0.3 < dropped.double().mean() < 0.7
    gate.eval()
    assert not (content.project(attended) == 0).any()
    assert attended.shape == (2, 10, FORK_CHANNELS)
