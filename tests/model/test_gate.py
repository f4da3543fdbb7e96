"""The gate: candidate scores, survivors, fork embedding (method: Gate)."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import randomise, tiny_config
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.model.gate import ForkGate, pack_left
from thoughtbubbles.model.streams import Streams

ALL = Fraction(8)  # a budget that lets every candidate survive


def random_gate(seed: int = 0, **rules: Any) -> ForkGate:
    gate = ForkGate(tiny_config(**rules))
    randomise(gate, seed)
    return gate


def entering(rows: int = 2, tokens: int = 5, dtype: torch.dtype = torch.float32) -> Streams:
    """Fresh tokens; the last row lacks its last two."""
    alive = torch.ones(rows, tokens, dtype=torch.bool)
    alive[-1, -2:] = False
    generator = torch.Generator().manual_seed(3)
    return Streams.from_embeddings(torch.randn(rows, tokens, 16, generator=generator).to(dtype), alive)


def second_layer(budget: Fraction = ALL) -> tuple[Streams, Streams]:
    """The streams before and after a second fork layer."""
    before = random_gate()(entering(), ALL)
    return before, random_gate(1)(before, budget)


def test_candidate_scores_by_hand() -> None:
    gate, streams = random_gate(), entering()
    scores = gate.candidate_scores(streams)
    x = streams.residual[0, 2].double()
    normed = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
    normed = normed * gate.norm.weight.double() + gate.norm.bias.double()
    fork, keep = gate.projection.weight.double() @ normed
    assert scores[0, 4].item() == pytest.approx(math.log(1 / (1 + math.exp(-fork.item()))), abs=1e-5)
    assert scores[0, 5].item() == pytest.approx(math.log(1 / (1 + math.exp(-keep.item()))), abs=1e-5)


def test_scores_accumulate_over_layers() -> None:
    before = random_gate()(entering(), ALL)
    fresh = random_gate(1).candidate_scores(Streams.from_embeddings(before.residual, before.alive))
    accumulated = random_gate(1).candidate_scores(before)
    assert torch.allclose(accumulated, fresh + before.log_score.repeat_interleave(2, 1), rtol=0, atol=1e-6)


def test_a_score_loses_at_most_twenty_per_layer() -> None:
    gate = random_gate()
    gate.projection.weight.data *= 1e4
    scores = gate.candidate_scores(entering())
    assert scores.min() == -20
    assert scores.max() <= 0


def test_the_score_of_a_root_is_multiplied_by_its_keep_score() -> None:
    streams, gate = entering(), random_gate()
    out = gate(streams, Fraction(1))
    assert torch.equal(out.log_score[0], gate.candidate_scores(streams)[0, 1::2])
    assert (out.log_score[0] < 0).all()


@pytest.mark.parametrize("start", [0.02, 0.5, 0.9])
def test_a_new_gate_gives_a_fork_about_its_start(start: float) -> None:
    model = ThoughtbubblesForCausalLM(tiny_config(gate_start=start, initializer_range=1e-4))
    gate = model.model.gates["1"]
    fork, keep = gate.candidate_scores(entering())[0].view(-1, 2).exp().unbind(-1)
    assert torch.allclose(fork, torch.full_like(fork, start), atol=2e-3)
    assert torch.allclose(keep, torch.full_like(keep, 0.5), atol=2e-3)


def test_the_start_of_a_gate_is_learned() -> None:
    gate, streams = random_gate(gate_start=0.02), entering()
    plain = random_gate()
    plain.load_state_dict({name: tensor for name, tensor in gate.state_dict().items() if name != "fork_bias"})
    before = plain.projection(plain.norm(streams.residual))[..., 0]
    scores = gate.candidate_scores(streams)
    assert torch.allclose(scores[:, ::2], F.logsigmoid(before + gate.fork_bias), atol=1e-6)
    assert torch.equal(scores[:, 1::2], plain.candidate_scores(streams)[:, 1::2])
    scores.sum().backward()
    assert gate.fork_bias.grad.abs() > 0
    assert random_gate(gate_start=0.02, gate_scores="fixed").fork_bias is None


def test_a_relative_embedding_grows_with_the_residual() -> None:
    streams = entering()
    small, large = (
        random_gate(1, fork_embedding="relative")(streams.with_residual(size * streams.residual), ALL)
        for size in (1, 8)
    )
    source, embedding = streams.residual[0, 0], random_gate(1, fork_embedding="relative").fork_embedding
    assert small.origin is not None
    assert small.origin[0, 0] == 0
    rms = source.square().mean().sqrt()
    assert torch.allclose(small.residual[0, 0], source + rms * embedding, rtol=0, atol=1e-6)
    assert torch.allclose(large.residual[0, 0], 8 * small.residual[0, 0], rtol=0, atol=1e-5)


def test_a_residual_of_zero_has_a_gradient_under_a_relative_embedding() -> None:
    residual = torch.zeros(1, 2, 16, requires_grad=True)
    out = random_gate(fork_embedding="relative")(Streams.from_embeddings(residual), ALL)
    out.residual.sum().backward()
    assert residual.grad is not None
    assert residual.grad.isfinite().all()


def test_with_scores_of_forks_alone_a_root_keeps_its_score() -> None:
    learned, forks = random_gate(), random_gate(gate_scores="forks")
    before = learned(entering(), ALL)
    roots = before.is_root
    theirs, ours = (gate.candidate_scores(before).unflatten(1, (-1, 2)) for gate in (learned, forks))
    assert torch.equal(ours[..., 1][roots], before.log_score[roots])
    assert torch.equal(ours[..., 1][~roots], theirs[..., 1][~roots])
    assert torch.equal(ours[..., 0], theirs[..., 0])


def test_a_root_is_never_attenuated_by_scores_of_forks_alone() -> None:
    first = random_gate(gate_scores="forks")(entering(), ALL)
    second = random_gate(1, gate_scores="forks")(first, ALL)
    assert (second.log_score[second.is_root] == 0).all()
    assert (second.log_score[second.alive & ~second.is_root] < 0).all()


def test_fixed_scores_are_one_half_whatever_the_stream() -> None:
    gate = random_gate(gate_scores="fixed")
    assert [name for name, _ in gate.named_parameters()] == ["fork_embedding"]
    before = random_gate()(entering(), ALL)
    expected = before.log_score.repeat_interleave(2, 1) + math.log(0.5)
    assert torch.allclose(gate.candidate_scores(before), expected, rtol=0, atol=1e-6)


def test_surviving_forks_get_the_fork_embedding_and_keeps_do_not() -> None:
    before, after = second_layer()
    embedding = random_gate(1).fork_embedding
    assert after.origin is not None
    for slot, origin in enumerate(after.origin[0].tolist()):
        source = before.residual[0, origin // 2]
        assert torch.equal(after.residual[0, slot], source + embedding if origin % 2 == 0 else source)


def test_a_fork_stands_directly_left_of_its_source() -> None:
    _, after = second_layer()
    assert after.origin is not None
    assert after.origin[0].tolist() == list(range(20))
    assert after.token[0].tolist() == [token for token in range(5) for _ in range(4)]


@pytest.mark.parametrize("budget", ["1", "6/5", "3/2", "2", "13/4", "8"])
def test_order_is_preserved_and_survivors_are_packed_left(budget: str) -> None:
    _, after = second_layer(Fraction(budget))
    assert after.origin is not None
    for origin, alive in zip(after.origin.tolist(), after.alive.tolist(), strict=True):
        chosen = [c for c in origin if c >= 0]
        assert chosen == sorted(set(chosen))
        assert alive == [True] * len(chosen) + [False] * (len(alive) - len(chosen))


def test_slots_without_a_survivor_are_empty() -> None:
    _, after = second_layer(Fraction(3, 2))
    dead = ~after.alive
    assert dead.any()
    assert after.origin is not None
    assert not after.residual[dead].any()
    assert not after.log_score[dead].any()
    assert (after.token[dead] == after.num_tokens).all()
    assert (after.origin[dead] == -1).all()


def test_a_gradient_reaches_the_gate_through_the_scores_of_survivors_alone() -> None:
    gate, streams = random_gate(), entering()
    out = gate(streams, Fraction(1))  # no fork survives
    out.log_score.sum().backward()
    assert gate.projection.weight.grad is not None
    assert gate.projection.weight.grad[1].any()
    assert not gate.projection.weight.grad[0].any()
    assert gate.fork_embedding.grad is None or not gate.fork_embedding.grad.any()


def test_the_gradient_of_a_survivors_score() -> None:
    gate = random_gate().double()
    streams = entering(1, 3, torch.float64)

    def scores(weight: Tensor, residual: Tensor) -> Tensor:
        given = streams.with_residual(residual)
        out: Tensor = torch.func.functional_call(gate, {"projection.weight": weight}, (given, ALL)).log_score
        return out

    inputs = (gate.projection.weight.detach().clone().requires_grad_(), streams.residual.clone().requires_grad_())
    assert torch.autograd.gradcheck(scores, inputs)


def test_scores_are_float32_whatever_the_residuals_are() -> None:
    gate = random_gate().to(torch.bfloat16)
    streams = entering(dtype=torch.bfloat16)
    scores = gate.candidate_scores(streams)
    normed = F.layer_norm(streams.residual.float(), (16,), gate.norm.weight.float(), gate.norm.bias.float(), 1e-5)
    expected = F.logsigmoid(normed @ gate.projection.weight.float().T).flatten(1)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, expected, rtol=0, atol=1e-5)
    assert gate(streams, ALL).residual.dtype == torch.bfloat16


@pytest.mark.parametrize("adapted", [False, True])
def test_autocast_does_not_reach_the_gate(adapted: bool) -> None:
    gate, streams = random_gate(), entering()
    expected = F.logsigmoid(gate.projection(gate.norm(streams.residual))).flatten(1)
    if adapted:  # adapters are products of matrices, which autocast narrows
        plain = torch.nn.Linear(16, 2, bias=False)
        plain.load_state_dict(gate.projection.state_dict())
        gate.projection = plain  # type: ignore[assignment]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = gate.candidate_scores(streams)
    assert torch.allclose(scores, expected, rtol=0, atol=1e-5)


def test_the_width_is_static() -> None:
    gate = random_gate()
    full, sparse = entering(1, 6), entering(1, 6)
    sparse = Streams.from_embeddings(sparse.residual, torch.arange(6)[None] < 2)
    assert gate(full, Fraction(3, 2)).token.shape == gate(sparse, Fraction(3, 2)).token.shape == (1, 9)


def test_draws_far_closer_than_scores_can_be_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork of the second token was drawn better than the first's, by less than a step of the routers' grid."""
    gate = random_gate(routing="random")
    draws = torch.tensor([[0.5, 0.1, 0.5 + 2**-40, 0.1]], dtype=torch.float64)
    monkeypatch.setattr("thoughtbubbles.model.controls.draw_scores", lambda *_: draws)
    out = gate(Streams.from_embeddings(torch.randn(1, 2, 16)), Fraction(3, 2))
    assert out.origin is not None
    assert out.origin.tolist() == [[1, 2, 3]]


def test_equal_streams_have_equal_scores_in_any_batch() -> None:
    gate = random_gate()
    for stream in torch.randn(20, 1, 1, 16):
        one = gate.candidate_scores(Streams.from_embeddings(stream))
        for rows, tokens in ((1, 2), (1, 7), (3, 33), (16, 64)):
            many = gate.candidate_scores(Streams.from_embeddings(stream.expand(rows, tokens, -1).contiguous()))
            assert torch.equal(many, one.repeat(rows, tokens))


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    st.integers(0, 4),
)
def test_packing_left(survive: list[list[bool]], spare: int) -> None:
    width = max(sum(row) for row in survive) + spare
    index, alive = pack_left(torch.tensor(survive), width)
    for row, bits in enumerate(survive):
        chosen = [c for c, bit in enumerate(bits) if bit]
        assert index[row].tolist() == chosen + [0] * (width - len(chosen))
        assert alive[row].tolist() == [True] * len(chosen) + [False] * (width - len(chosen))
