"""The controls: the hash of `random` and `uniform`, the streams of `copy` and `pause` (method: Controls)."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import (
    LEFT_TO_RIGHT,
    case_id,
    compare_with_reference,
    of_whole_models,
    padding_mask,
    put_at,
    random_ids,
    routed,
    survivors_of,
    tiny_config,
    tiny_model,
)
from thoughtbubbles.model import reference
from thoughtbubbles.model.budget import floor_times, parse_budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.controls import StreamCopier, draw_scores
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM, ThoughtbubblesModel
from thoughtbubbles.model.streams import Streams

every_rule = pytest.mark.parametrize("rules", LEFT_TO_RIGHT, ids=case_id)
every_copy = pytest.mark.parametrize(
    "rules", [rules for rules in LEFT_TO_RIGHT if rules["routing"] in ("copy", "pause")], ids=case_id
)
every_draw = pytest.mark.parametrize("routing", ["random", "random-topk", "uniform"])


# --- The hash ---

counters = st.integers(0, 2**32 - 1)
bubbles = st.lists(st.integers(1, 4), min_size=1, max_size=8)


def copier_of(config: ThoughtbubblesConfig) -> StreamCopier:
    copier = ThoughtbubblesModel(config).copier
    assert copier is not None
    return copier


def candidate_tokens(sizes: list[int], first: int = 0) -> Tensor:
    """[1, M] ordinals of the candidates of tokens with so many streams."""
    return torch.tensor([[first + token for token, size in enumerate(sizes) for _ in range(2 * size)]])


@given(bubbles, st.integers(0, 2**20), st.integers(0, 99), counters, counters)
def test_draws_are_those_of_the_reference(sizes: list[int], first: int, layer: int, seed: int, step: int) -> None:
    tokens = candidate_tokens(sizes, first)
    expected = [
        reference.draw(seed, step, layer, first + token, place)
        for token, size in enumerate(sizes)
        for place in range(2 * size)
    ]
    assert draw_scores(tokens, layer, seed, step)[0].tolist() == expected
    assert draw_scores(tokens, layer, seed, torch.tensor(step))[0].tolist() == expected


def test_draws_stay_what_they_were() -> None:
    """A seed shall mean the same for ever."""
    drawn = draw_scores(candidate_tokens([1, 2]), layer=3, seed=5, step=7)[0]
    assert [round(value, 9) for value in drawn.tolist()] == [
        0.58001492,
        0.021449931,
        0.657699007,
        0.026624286,
        0.622076848,
        0.65268467,
    ]


def test_draws_are_even_and_differ() -> None:
    drawn = draw_scores(candidate_tokens([4] * 50_000), layer=1, seed=0)[0]
    assert drawn.dtype == torch.float64
    assert drawn.unique().numel() == 400_000
    assert torch.histc(drawn, 50, 0, 1).sub(8000).abs().max() < 400  # 4.5 standard deviations
    for lag in range(1, 9):
        correlation = torch.corrcoef(torch.stack([drawn[:-lag], drawn[lag:]]))[0, 1]
        assert correlation.abs() < 0.008  # 5 standard deviations


@pytest.mark.parametrize("counter", ["layer", "seed", "step"])
def test_draws_depend_on_every_counter(counter: str) -> None:
    tokens, base = candidate_tokens([4] * 5000), {"layer": 1, "seed": 2, "step": 3}
    values = [draw_scores(tokens, **{**base, counter: value})[0] for value in range(6)]
    correlation = torch.corrcoef(torch.stack(values)) - torch.eye(6)
    assert correlation.abs().max() < 0.025  # 5 standard deviations


@given(st.lists(bubbles, min_size=2, max_size=4), counters)
def test_draws_of_a_row_do_not_depend_on_the_batch(batch: list[list[int]], seed: int) -> None:
    rows = [candidate_tokens(sizes)[0] for sizes in batch]
    together = torch.full((len(rows), max(map(len, rows))), 99)
    for index, row in enumerate(rows):
        together[index, : len(row)] = row
    drawn = draw_scores(together, 1, seed)
    for index, row in enumerate(rows):
        assert torch.equal(drawn[index, : len(row)], draw_scores(row[None], 1, seed)[0])


# --- The models: causality, budget, batch ---


@lru_cache(maxsize=8)
def still_model(seed: int, **rules: Any) -> ThoughtbubblesForCausalLM:
    """One that no test changes, made once for all the examples of a test."""
    return tiny_model(seed, **rules)


def logits_and_streams(model: ThoughtbubblesForCausalLM, ids: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
    with torch.no_grad():
        out = model(ids, output_streams=True, **arguments)
    return out.logits, out.streams


@every_rule
@of_whole_models
@given(length=st.integers(2, 17), data=st.data())
def test_changed_suffix_leaves_the_same_bits_before_it(rules: dict[str, Any], length: int, data: st.DataObject) -> None:
    prefix = data.draw(st.integers(1, length - 1))
    ids, model = random_ids(2, length, seed=length), still_model(0, **rules)
    changed = torch.cat([ids[:, :prefix], random_ids(2, length - prefix, seed=99)], dim=1)
    before, after = (logits_and_streams(model, each)[0] for each in (ids, changed))
    assert torch.equal(before[:, :prefix], after[:, :prefix])


@every_rule
@of_whole_models
@given(length=st.integers(2, 17), data=st.data())
def test_prefix_alone_gives_the_same_logits(rules: dict[str, Any], length: int, data: st.DataObject) -> None:
    prefix = data.draw(st.integers(1, length - 1))
    ids, model = random_ids(2, length, seed=length), still_model(0, **rules)
    whole, part = (logits_and_streams(model, each)[0] for each in (ids, ids[:, :prefix]))
    assert torch.allclose(part, whole[:, :prefix], rtol=0, atol=1e-5)


@every_rule
@of_whole_models
@given(length=st.integers(1, 17), seed=st.integers(0, 5))
def test_roots_order_and_budget_of_every_prefix(rules: dict[str, Any], length: int, seed: int) -> None:
    mask = padding_mask("holes", 3, length)
    assert mask is not None
    _, trail = logits_and_streams(still_model(seed, **rules), random_ids(3, length), attention_mask=mask)
    for streams in trail:
        assert torch.equal(streams.is_root.sum(1), mask.sum(1))
        assert (streams.token.diff(dim=1) >= 0).all()
        for tokens in range(1, length + 1):
            alive = (streams.alive & (streams.token < tokens)).sum(1)
            assert (alive <= floor_times(parse_budget(rules["budget"]), tokens)).all()


@every_rule
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padding_and_other_rows_do_not_matter(rules: dict[str, Any], padding: str) -> None:
    model, ids, mask = tiny_model(**rules), random_ids(4, 13), padding_mask(padding, 4, 13)
    assert mask is not None
    together, trail = logits_and_streams(model, ids, attention_mask=mask)
    layers = model.config.gated_layers
    for row in range(4):
        real = mask[row].bool()
        alone, own = logits_and_streams(model, ids[row : row + 1, real])
        assert torch.allclose(together[row, real], alone[0], rtol=0, atol=1e-5)
        assert survivors_of(trail, layers)[row] == survivors_of(own, layers)[0]
    assert together.isfinite().all()


@every_rule
def test_a_row_of_padding_alone_is_harmless(rules: dict[str, Any]) -> None:
    model, ids = tiny_model(**rules), random_ids(2, 9)
    mask = torch.tensor([[1], [0]]).expand(2, 9)
    out = model(ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# --- Random and uniform ---


def chosen(model: ThoughtbubblesForCausalLM, ids: Tensor, **arguments: Any) -> list[dict[int, list[int]]]:
    trail = logits_and_streams(model, ids, **arguments)[1]
    return survivors_of(trail, model.config.gated_layers)


@every_draw
def test_survivors_know_nothing_of_the_tokens_or_the_weights(routing: str) -> None:
    first = chosen(tiny_model(0, **routed(routing), budget=1.5), random_ids(1, 23))
    other = chosen(tiny_model(1, **routed(routing), budget=1.5), random_ids(2, 23, seed=9))
    assert other == 2 * first
    causal = [chosen(tiny_model(seed, budget=1.5), random_ids(1, 23)) for seed in (0, 1)]
    assert causal[0] != causal[1]


@every_draw
def test_seed_changes_the_survivors(routing: str) -> None:
    ids = random_ids(1, 23)
    first, second = (chosen(tiny_model(**routed(routing), budget=1.5, routing_seed=seed), ids)[0] for seed in (0, 1))
    assert all(first[layer] != second[layer] for layer in second) or routing == "uniform"
    assert first[2] != second[2]


@every_draw
def test_steps_count_in_training_alone(routing: str) -> None:
    model, ids = tiny_model(**routed(routing), budget=1.5), random_ids(2, 23)
    evaluated = chosen(model, ids)
    model.model.routing_step.fill_(3)
    assert chosen(model, ids) == evaluated
    model.train()
    third = chosen(model, ids)
    assert third == chosen(model, ids) != evaluated
    model.model.routing_step.fill_(0)
    assert chosen(model, ids) == evaluated


@every_draw
def test_training_at_a_step_equals_the_reference(routing: str) -> None:
    model = tiny_model(5, **routed(routing), budget=1.5, routing_seed=2**32 - 1).train()
    model.model.routing_step.fill_(12345)
    agreement = compare_with_reference(model, random_ids(3, 11), padding_mask("holes", 3, 11))
    assert agreement.logits < 1e-4
    assert max(agreement.gradients.values()) < 1e-3


def test_step_is_there_after_loading_and_is_not_stored(tmp_path: Path) -> None:
    model = tiny_model(routing="random")
    model.model.routing_step.fill_(3)
    model.save_pretrained(tmp_path)
    again: Any = ThoughtbubblesForCausalLM.from_pretrained(tmp_path)
    assert again.model.routing_step.item() == 0
    assert "model.routing_step" not in model.state_dict()
    ids = random_ids(2, 9)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("budget", [1.2, 1.5, 2, 3.25])
def test_uniform_spends_what_each_token_may(budget: float) -> None:
    _, trail = logits_and_streams(
        tiny_model(routing="uniform", fork_layers=[0, 1, 2, 3]), random_ids(1, 23), budget=budget
    )
    kappa = parse_budget(budget) - 1
    share = [floor_times(kappa, t + 1) - floor_times(kappa, t) for t in range(23)]
    assert trail[-1].bubble_sizes()[0].tolist() == [1 + each for each in share]


def test_random_gates_still_attenuate_and_learn() -> None:
    model, ids = tiny_model(routing="random", budget=2), random_ids(2, 13)
    out = model(ids, labels=ids, output_streams=True)
    out.loss.backward()
    assert (out.streams[-1].log_score < 0).all()
    assert all(gate.projection.weight.grad.abs().max() > 0 for gate in model.model.gates.values())


def test_one_compiled_graph_serves_every_step() -> None:
    model, ids = tiny_model(routing="random", budget=1.5).train(), random_ids(2, 9)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=count)
    for step in range(1, 12):
        model.model.routing_step.fill_(step)
        assert torch.allclose(compiled(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    assert len(graphs) == 1


# --- Copy and pause ---


def entering(config: Any) -> Streams:
    alive = torch.tensor([[True] * 4, [True, True, False, False]])
    return Streams.from_embeddings(torch.randn(2, 4, config.hidden_size), alive)


def test_copies_are_equal_streams_at_fractional_positions() -> None:
    config = tiny_config(routing="copy", budget=3)
    before = entering(config)
    after = copier_of(config)(before, 3)
    assert after.token.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], [0, 0, 0, 1, 1, 1, *[4] * 6]]
    assert torch.equal(after.residual, before.residual.repeat_interleave(3, dim=1))
    assert not after.log_score.any()
    assert torch.allclose(after.positions()[1, :6], torch.tensor([-2, -1, 0, 1, 2, 3]) / 3)
    assert after.is_root[1].tolist() == [False, False, True] * 2 + [False] * 6
    assert after.origin is not None
    assert after.origin[1].tolist() == [0, 0, 1, 2, 2, 3, *[-1] * 6]


def test_pauses_follow_their_token() -> None:
    config = tiny_config(routing="pause", budget=3)
    copier, before = copier_of(config), entering(config)
    after = copier(before, 3)
    assert copier.pause_embeddings is not None
    first, second = copier.pause_embeddings.weight
    for token in (0, 1):
        bubble = after.residual[1, 3 * token : 3 * token + 3]
        assert torch.equal(bubble, torch.stack([before.residual[1, token], first, second]))
    assert not after.residual[1, 6:].any()
    assert torch.equal(copier(before, 2).residual[1, 3], first)


def test_pause_vectors_start_like_embeddings() -> None:
    model = ThoughtbubblesForCausalLM(tiny_config(routing="pause", budget=200, initializer_range=0.1))
    vectors = model.model.copier.pause_embeddings.weight
    assert vectors.shape == (199, 16)
    assert vectors.std().item() == pytest.approx(0.1, rel=0.1)
    assert len(vectors.unique(dim=0)) == 199


@every_copy
def test_streams_start_at_their_layer(rules: dict[str, Any]) -> None:
    _, trail = logits_and_streams(tiny_model(**rules), random_ids(2, 9))
    layer = rules.get("copy_layer", 0)
    assert [streams.token.shape[1] for streams in trail] == [9] * layer + [9 * rules["budget"]] * (5 - layer)
    assert not any(streams.log_score.any() for streams in trail)


@pytest.mark.parametrize("merge", ["residual", "residual-normed", "probability", "root"])
def test_copies_that_do_not_differ_merge_into_the_dense_model(merge: str) -> None:
    """Made at the last layer by blocks that ignore positions, all copies are the dense stream: so is any mean."""
    dense = tiny_model(routing="none", merge=merge)
    copied = tiny_model(routing="copy", copy_layer=3, budget=4, merge=merge)
    for model in (dense, copied):
        model.model.layers[3].attention.o_proj.weight.data.zero_()
    # A LayerNorm that sees how large the streams are tells a mean from a sum.
    dense.model.norm.eps = copied.model.norm.eps = 1.0
    ids = random_ids(2, 9)
    expected = dense(ids).logits
    if merge == "probability":
        expected = expected.log_softmax(-1)
    assert torch.allclose(copied(ids).logits.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-5)
    assert torch.allclose(copied(ids).logits, expected, rtol=0, atol=1e-5)


def test_copies_compute_something() -> None:
    ids = random_ids(2, 9)
    assert not torch.allclose(tiny_model(routing="copy")(ids).logits, tiny_model(routing="none")(ids).logits, atol=1e-2)


@every_copy
def test_budget_of_a_call_is_whole(rules: dict[str, Any]) -> None:
    model, ids = tiny_model(**rules), random_ids(1, 5)
    for budget in (1.5, "4/3"):
        with pytest.raises(ValueError, match=f"budget={budget!r}: expected a whole number of streams per token"):
            model(ids, budget=budget)
    fewer = model(ids, budget="2.0", output_streams=True)
    assert fewer.streams[-1].token.shape[1] == 10


def test_copy_can_have_more_streams_than_configured_and_pause_cannot() -> None:
    ids = random_ids(1, 5)
    assert tiny_model(routing="copy", budget=2)(ids, budget=5, output_streams=True).streams[-1].token.shape[1] == 25
    with pytest.raises(ValueError, match="budget=3: expected at most 2, for which there are pause vectors"):
        tiny_model(routing="pause", budget=2)(ids, budget=3)


@pytest.mark.parametrize("routing", ["copy", "pause"])
def test_budget_of_one_is_the_dense_model(routing: str) -> None:
    dense, model = tiny_model(routing="none"), tiny_model(routing=routing, budget=1)
    model.load_state_dict(dense.state_dict(), strict=False)
    ids = random_ids(2, 9)
    assert torch.allclose(model(ids).logits, dense(ids).logits, rtol=0, atol=1e-6)


@every_copy
@pytest.mark.parametrize("place", [range(6, 13), range(7), (0, 1, 4, 6, 7, 11, 12)], ids=["left", "right", "holes"])
def test_padding_does_not_matter_to_copies(rules: dict[str, Any], place: Any) -> None:
    model, ids = tiny_model(**rules), random_ids(1, 7)
    padded, mask = put_at(ids[0], place, 13, filler=4)
    expected, out = model(ids).logits, model(padded, attention_mask=mask).logits
    assert torch.allclose(out[:, list(place)], expected, rtol=0, atol=1e-5)


def test_dropout_of_pauses_is_that_of_embeddings() -> None:
    config = tiny_config(routing="pause", budget=3, hidden_dropout=0.5)
    copier = copier_of(config).train()
    torch.manual_seed(0)
    after = copier(Streams.from_embeddings(torch.ones(1, 400, 16)), 3).residual.view(400, 3, 16)
    assert (after[:, 0] == 1).all()
    assert (after[:, 1:] == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert not torch.equal(after[0, 1] == 0, after[1, 1] == 0)
