"""The whole model against the reference and against its promises."""

import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from tests.helpers import (
    OTHER_BLOCKS,
    ROPES,
    VOCAB,
    Case,
    all_pairs,
    case_id,
    compare_with_reference,
    padding_mask,
    put_at,
    random_ids,
    random_model,
    relative_errors,
    routed,
    survivors_of,
    tiny_config,
    tiny_model,
)
from thoughtbubbles.model.budget import floor_times, parse_budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.gate import ForkGate
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM, ThoughtbubblesModel
from thoughtbubbles.model.reference import reference_forward
from thoughtbubbles.model.streams import Streams

FACTORS: dict[str, list[Any]] = {
    "routing": ["causal", "threshold", "topk", "none", "random", "random-topk", "uniform"],
    "gate_scores": ["learned", "forks", "fixed"],
    "gate_start": [None, 0.1],
    "fork_embedding": ["absolute", "relative"],
    "fork_content": ["embedding", "attended"],
    "attenuation": ["paper", "released", "none"],
    "merge": ["residual", "residual-normed", "probability", "root"],
    "budget": [1, 1.2, 1.5, 2, 3.25, 4],
    "length": [1, 5, 7, 11],
    "padding": ["none", "left", "right", "holes"],
    "fork_layers": [[1, 2], [0, 1, 3], [0]],
}
COPIES: dict[str, list[Any]] = {
    **FACTORS,
    "routing": ["copy", "pause"],
    "budget": [1, 2, 3],
    "fork_layers": [[1]],
    "copy_layer": [0, 2],
}
BLOCKS: dict[str, list[Any]] = {
    "routing": ["causal", "none", "topk"],
    "attenuation": ["paper", "released", "none"],
    "merge": ["residual", "residual-normed", "probability", "root"],
    "padding": ["none", "left", "holes"],
    "norm": ["layernorm", "rmsnorm"],
    "mlp": ["plain", "gated"],
    "hidden_act": ["gelu", "silu", "gelu_pytorch_tanh"],
    "num_key_value_heads": [4, 2, 1],
    "head_dim": [4, 10],
    "use_bias": [True, False],
    "attention_bias": [None, True, False],
    "attention_output_bias": [None, True, False],
    "mlp_bias": [None, True, False],
    "qk_norm": [False, True],
    "parallel_residual": [False, True],
    "partial_rotary_factor": [1.0, 0.5, 0.8],
    "rope_parameters": [None, *ROPES],
    "fork_content": ["embedding", "attended"],
}
GATED = [routing for routing in FACTORS["routing"] if routing != "none"]
RULES = list(itertools.product(FACTORS["attenuation"], FACTORS["merge"]))
EVERY_RULE = [pytest.param(attenuation, merge, id=f"{attenuation}-{merge}") for attenuation, merge in RULES]


# --- Against the reference ---


def check_against_reference(case: Case, record_property: Callable[[str, object], None]) -> None:
    rules = {name: value for name, value in case.items() if name not in ("routing", "length", "padding")}
    seed = case["length"] + 100 * len(case["fork_layers"])
    model = tiny_model(seed, **routed(case["routing"]), **rules)
    ids = random_ids(3, case["length"], seed)
    agreement = compare_with_reference(model, ids, padding_mask(case["padding"], *ids.shape))
    record_property("flips", agreement.flips)
    assert agreement.logits < 1e-4
    assert agreement.loss < 1e-4
    assert max(agreement.gradients.values()) < 1e-3, agreement.gradients


@pytest.mark.parametrize("case", all_pairs(FACTORS) + all_pairs(COPIES), ids=case_id)
def test_model_equals_the_reference(case: Case, record_property: Callable[[str, object], None]) -> None:
    check_against_reference(case, record_property)


@pytest.mark.parametrize("case", all_pairs(BLOCKS), ids=case_id)
def test_other_blocks_equal_the_reference(case: Case) -> None:
    check_block_against_reference(case)


def check_block_against_reference(case: Case) -> None:
    """In float32 and, where no frequency is scaled, in float64: scaled ones are float32 numbers, as in transformers."""
    fields = {name: value for name, value in case.items() if name not in ("padding", "routing")}
    is_odd = int(case["head_dim"] * case["partial_rotary_factor"]) % 2 == 1
    if is_odd and case["rope_parameters"] is not None and case["rope_parameters"]["rope_type"] == "yarn":
        fields["partial_rotary_factor"] = 1.0  # yarn is refused there
    model = tiny_model(3, **routed(case["routing"]), **fields, num_attention_heads=4, num_hidden_layers=3, budget=1.5)
    ids = random_ids(2, 7)
    mask = padding_mask(case["padding"], *ids.shape)
    agreement = compare_with_reference(model, ids, mask)
    assert agreement.logits < 1e-4
    assert agreement.loss < 1e-4
    assert max(agreement.gradients.values()) < 1e-3, agreement.gradients
    if case["rope_parameters"] is None:
        model.zero_grad()
        exact = compare_with_reference(model.double(), ids, mask)
        assert exact.logits < 1e-9
        assert max(exact.gradients.values()) < 1e-6, exact.gradients


@pytest.mark.long
@pytest.mark.parametrize("seed", range(300))
def test_any_block_equals_the_reference(seed: int) -> None:
    chooser = random.Random(seed)
    check_block_against_reference({name: chooser.choice(values) for name, values in BLOCKS.items()})


def sample_of_the_grid(size: int) -> list[Case]:
    chooser = random.Random(0)
    grids = [FACTORS] * size + [COPIES] * (size // 4)
    return [{name: chooser.choice(values) for name, values in grid.items()} for grid in grids]


@pytest.mark.long
@pytest.mark.parametrize("case", sample_of_the_grid(600), ids=case_id)
def test_model_equals_the_reference_on_the_grid(case: Case, record_property: Callable[[str, object], None]) -> None:
    check_against_reference(case, record_property)


SPENT = [
    ("causal", 1.5),
    ("threshold", 1.5),
    ("topk", 1.2),
    ("causal", 1),
    ("random", 1.5),
    ("uniform", 1.2),
    ("copy", 2),
]


@pytest.mark.parametrize(
    ("attenuation", "merge", "spent"),
    [
        *((*rules, [SPENT[place % 7], SPENT[(place + 3) % 7]]) for place, rules in enumerate(RULES)),
        *(pytest.param(*rules, SPENT, marks=pytest.mark.long) for rules in RULES),
    ],
    ids=str,
)
def test_float64_model_equals_the_reference_to_the_last_digits(
    attenuation: str, merge: str, spent: list[tuple[str, float]]
) -> None:
    for routing, budget in spent:
        model = tiny_model(5, routing=routing, merge=merge, attenuation=attenuation, budget=budget).double()
        agreement = compare_with_reference(model, random_ids(2, 8), padding_mask("holes", 2, 8))
        assert agreement.flips == 0
        assert agreement.logits < 1e-9
        assert max(agreement.gradients.values()) < 1e-6, agreement.gradients


def test_reference_alone_chooses_the_same_survivors() -> None:
    """The other tests hand the reference the model's survivors."""
    for routing in GATED:
        model, ids = tiny_model(5, **routed(routing), budget=1.5).double(), random_ids(3, 9)
        mask = padding_mask("holes", 3, 9)
        out = model(ids, attention_mask=mask, output_streams=True)
        forks = reference_forward(model.config, model.state_dict(), ids, mask).forks
        chosen = [{layer: fork.survivors for layer, fork in row.items()} for row in forks]
        assert survivors_of(out.streams, model.config.gated_layers) == chosen


@pytest.mark.parametrize(
    "overrides",
    [{"use_bias": False}, {"tie_word_embeddings": False}, {"num_attention_heads": 1}, {"rope_theta": 7.0}],
    ids=str,
)
def test_other_shapes_equal_the_reference(overrides: dict[str, Any]) -> None:
    agreement = compare_with_reference(tiny_model(2, **overrides), random_ids(2, 9))
    assert agreement.logits < 1e-4
    assert max(agreement.gradients.values()) < 1e-3


def test_budget_of_a_call_equals_the_reference() -> None:
    agreement = compare_with_reference(tiny_model(3, budget=1), random_ids(2, 9), budget="7/3")
    assert agreement.logits < 1e-4


def test_comparison_notices_another_model() -> None:
    model = tiny_model()
    model.model.layers[3].mlp.act = nn.ReLU()
    agreement = compare_with_reference(model, random_ids(2, 9))
    assert agreement.logits > 1e-2
    assert max(agreement.gradients.values()) > 1e-2


@pytest.mark.parametrize("grid", [FACTORS, BLOCKS], ids=["rules", "blocks"])
def test_pairwise_cases_cover_all_pairs(grid: dict[str, list[Any]]) -> None:
    cases = all_pairs(grid)
    for a, b in itertools.combinations(grid, 2):
        for value, other in itertools.product(grid[a], grid[b]):
            assert any(case[a] == value and case[b] == other for case in cases)


# --- The dense decoder ---


def plain_transformer(parameters: dict[str, Tensor], ids: Tensor, heads: int) -> Tensor:
    """A pre-norm decoder with rotary embedding, GELU and tied unembedding; knows nothing of streams."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    def turn(x: Tensor) -> Tensor:  # [B, T, H, K], at positions 0, 1, ...
        half = x.shape[-1] // 2
        angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        turned = torch.view_as_complex(torch.stack([x[..., :half], x[..., half:]], -1).contiguous())
        turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    batch, length = ids.shape
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    x = F.embedding(ids, parameters["model.embed_tokens.weight"])
    layer = 0
    while f"model.layers.{layer}.mlp.up_proj.weight" in parameters:
        name = f"model.layers.{layer}"
        qkv = linear(f"{name}.attention.qkv_proj", norm(f"{name}.attention_norm", x))
        q, k, v = (part.view(batch, length, heads, -1) for part in qkv.chunk(3, dim=-1))
        logits = torch.einsum("bqhk,bshk->bhqs", turn(q), turn(k)) / math.sqrt(q.shape[-1])
        weights = logits.masked_fill(future, -torch.inf).softmax(-1)
        attended = torch.einsum("bhqs,bshk->bqhk", weights, v).flatten(2)
        x = x + linear(f"{name}.attention.o_proj", attended)
        hidden = F.gelu(linear(f"{name}.mlp.up_proj", norm(f"{name}.mlp_norm", x)))
        x = x + linear(f"{name}.mlp.down_proj", hidden)
        layer += 1
    return norm("model.norm", x) @ parameters["model.embed_tokens.weight"].T


@pytest.mark.parametrize("attenuation", FACTORS["attenuation"])
def test_routing_none_is_a_plain_transformer(attenuation: str) -> None:
    model = tiny_model(routing="none", attenuation=attenuation)
    ids = random_ids(3, 13)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = plain_transformer(parameters, ids, 2)
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    out = model(ids, labels=ids)
    assert torch.allclose(out.logits, expected, rtol=0, atol=1e-5)
    assert out.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert max(relative_errors(gradients, {n: p.grad for n, p in parameters.items()}).values()) < 1e-4


def test_routing_none_has_no_gates() -> None:
    assert not tiny_model(routing="none").model.gates


# --- Causality and budget ---


@pytest.mark.parametrize(("attenuation", "merge"), EVERY_RULE)
def test_changed_suffix_leaves_the_same_bits_before_it(attenuation: str, merge: str) -> None:
    for budget, length, prefix in ((1.2, 48, 17), (2, 9, 5), (3.25, 31, 30)):
        model = tiny_model(attenuation=attenuation, merge=merge, budget=budget)
        ids = random_ids(2, length)
        changed = torch.cat([ids[:, :prefix], random_ids(2, length - prefix, seed=9)], dim=1)
        with torch.no_grad():
            before, after = model(ids).logits, model(changed).logits
        assert torch.equal(before[:, :prefix], after[:, :prefix])
        assert not torch.equal(before[:, prefix:], after[:, prefix:])


@pytest.mark.parametrize(("attenuation", "merge"), EVERY_RULE)
def test_prefix_alone_gives_the_same_logits(attenuation: str, merge: str) -> None:
    model = tiny_model(attenuation=attenuation, merge=merge, budget=1.5)
    ids = random_ids(2, 19)
    whole, layers = model(ids, output_streams=True), model.config.gated_layers
    for length in (1, 2, 7, 18):
        alone = model(ids[:, :length], output_streams=True)
        for prefix, row in zip(survivors_of(alone.streams, layers), survivors_of(whole.streams, layers), strict=True):
            assert all(row[layer][: len(prefix[layer])] == prefix[layer] for layer in layers)
        assert torch.allclose(alone.logits, whole.logits[:, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 1.2, 4 / 3, 1.5, 2, 3.25, 4])
def test_streams_of_every_prefix_keep_to_the_budget_at_every_layer(budget: float) -> None:
    model, ids = tiny_model(fork_layers=[0, 1, 3]), random_ids(3, 23)
    out = model(ids, attention_mask=padding_mask("holes", 3, 23), budget=budget, output_streams=True)
    for streams in out.streams:
        for tokens in range(1, 24):
            alive = (streams.token < tokens).logical_and(streams.alive).sum(1)
            assert (alive <= floor_times(parse_budget(budget), tokens)).all()


def test_forks_happen_at_all() -> None:
    streams = tiny_model(budget=2)(random_ids(2, 23), output_streams=True).streams
    sizes = streams[-1].bubble_sizes()
    assert sizes.min() == 1
    assert sizes.max() > 2


@pytest.mark.parametrize("routing", GATED)
def test_budget_of_one_admits_no_fork(routing: str) -> None:
    streams = tiny_model(**routed(routing), budget=1)(random_ids(2, 9), output_streams=True).streams
    assert all(s.is_root.all() for s in streams)


@pytest.mark.parametrize("routing", GATED)
def test_budget_beyond_all_candidates_lets_all_survive(routing: str) -> None:
    streams = tiny_model(**routed(routing))(random_ids(2, 9), budget=16, output_streams=True).streams
    assert (streams[1].bubble_sizes() == 2).all()
    assert (streams[-1].bubble_sizes() == 4).all()


def test_topk_leaks_the_future_into_earlier_logits() -> None:
    """The causality tests above can fail: they do for the paper's rule."""
    model = tiny_model(routing="topk", budget=1.5)
    ids = random_ids(1, 24)
    changed = torch.cat([ids[:, :12], random_ids(1, 12, seed=9)], dim=1)
    leak = (model(ids).logits - model(changed).logits)[:, :12].abs().max()
    assert leak > 0.1


# --- Padding and rows ---

PLACES = {
    "left": range(6, 13),
    "right": range(7),
    "both": range(3, 10),
    "holes": (0, 1, 4, 6, 7, 11, 12),
}


@pytest.mark.parametrize(
    "case", all_pairs({"routing": FACTORS["routing"], "merge": FACTORS["merge"], "place": list(PLACES)}), ids=case_id
)
def test_padding_does_not_matter(case: Case) -> None:
    routing, merge, place = case["routing"], case["merge"], case["place"]
    model = tiny_model(**routed(routing), merge=merge, budget=1.5)
    ids = random_ids(1, 7)
    padded, mask = put_at(ids[0], PLACES[place], 13, filler=4)
    expected, out = model(ids, output_streams=True), model(padded, attention_mask=mask, output_streams=True)
    layers = model.config.gated_layers
    assert survivors_of(out.streams, layers) == survivors_of(expected.streams, layers)
    assert torch.allclose(out.logits[:, list(PLACES[place])], expected.logits, rtol=0, atol=1e-5)
    assert out.logits.isfinite().all()


@pytest.mark.parametrize("routing", GATED)
def test_rows_do_not_matter_to_each_other(routing: str) -> None:
    model = tiny_model(**routed(routing), budget=1.5)
    ids, mask = random_ids(4, 11), padding_mask("left", 4, 11)
    assert mask is not None
    together = model(ids, attention_mask=mask).logits
    for row in range(4):
        alone = model(ids[row : row + 1], attention_mask=mask[row : row + 1]).logits
        real = mask[row].bool()
        assert torch.allclose(together[row, real], alone[0, real], rtol=0, atol=1e-5)


def test_a_mask_of_ones_is_no_mask() -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    assert torch.allclose(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 1.5, 2, 16])
@pytest.mark.parametrize("routing", GATED)
def test_a_row_of_one_token(routing: str, budget: float) -> None:
    model = tiny_model(**routed(routing), budget=budget)
    single = model(torch.tensor([[5]]), output_streams=True)
    for streams in single.streams:
        assert streams.is_root.sum() == 1
    batch, mask = random_ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    batch[1, 3], mask[1] = 5, torch.tensor([0, 0, 0, 1, 0, 0])
    out = model(batch, attention_mask=mask, output_streams=True)
    assert all((s.is_root.sum(1) == torch.tensor([6, 1])).all() for s in out.streams)
    assert torch.allclose(out.logits[1, 3], single.logits[0, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("merge", FACTORS["merge"])
def test_a_row_of_padding_alone_is_harmless(merge: str) -> None:
    model, ids = tiny_model(merge=merge), random_ids(2, 9)
    expected = model(ids, labels=ids)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    mask = torch.tensor([[1], [0], [1]]).expand(3, 9)
    more = torch.stack([ids[0], torch.zeros_like(ids[0]), ids[1]])
    out = model(more, attention_mask=mask, labels=more)
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert out.loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    errors = relative_errors({name: p.grad for name, p in model.named_parameters()}, gradients)
    assert max(errors.values()) < 1e-4


# --- Dead slots ---


@pytest.mark.parametrize("attenuation", FACTORS["attenuation"])
@pytest.mark.parametrize("routing", FACTORS["routing"])
def test_dead_slots_are_empty_at_every_layer(routing: str, attenuation: str) -> None:
    model = tiny_model(**routed(routing), attenuation=attenuation, budget=1.5)
    ids, mask = random_ids(3, 11), padding_mask("holes", 3, 11)
    for streams in model(ids, attention_mask=mask, output_streams=True).streams:
        dead = ~streams.alive
        assert dead.any()
        assert not streams.residual[dead].any()
        assert not streams.log_score[dead].any()
        assert (streams.token[dead] == 11).all()
        assert (streams.alive.int().diff(dim=1) <= 0).all()
        assert (streams.token.diff(dim=1) >= 0).all()
        assert streams.residual.isfinite().all()
        assert streams.log_score.isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("merge", FACTORS["merge"])
def test_no_logit_and_no_gradient_reads_padding(merge: str, poison: float) -> None:
    model = tiny_model(merge=merge)
    mask = padding_mask("holes", 3, 11)
    assert mask is not None
    clean = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(0)) * mask[..., None]
    poisoned = clean.masked_fill(mask[..., None] == 0, poison).requires_grad_()
    out = model(inputs_embeds=poisoned, attention_mask=mask, labels=random_ids(3, 11))
    out.loss.backward()
    assert torch.equal(out.logits, model(inputs_embeds=clean, attention_mask=mask).logits)
    assert poisoned.grad is not None
    assert not poisoned.grad[mask == 0].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_embedding_of_the_padding_token_is_not_read() -> None:
    model = tiny_model(tie_word_embeddings=False)
    ids, mask = torch.tensor([[0, 0, 3, 4, 5], [0, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    expected = model(ids, attention_mask=mask).logits
    model.model.embed_tokens.weight.data[0] = torch.nan
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)


# --- Number types ---


@pytest.mark.parametrize("attenuation", ["paper", "released"])
@pytest.mark.parametrize("budget", [1, 4])
def test_bfloat16_stays_near_float32(budget: int, attenuation: str) -> None:
    """Survivors do not depend on scores at these budgets. Measured, in norm over all logits: at most 1.4%."""
    for seed in range(4):
        model, ids = tiny_model(seed, attenuation=attenuation, budget=budget), random_ids(3, 17, seed)
        mask = padding_mask("left", 3, 17)
        assert mask is not None
        expected = model(ids, attention_mask=mask, output_streams=True)
        out = model.to(torch.bfloat16)(ids, attention_mask=mask, output_streams=True)
        assert torch.equal(out.streams[-1].token, expected.streams[-1].token)
        assert out.logits.dtype == torch.bfloat16
        assert relative_error(out.logits[mask.bool()], expected.logits[mask.bool()]) < 0.02


@pytest.mark.parametrize("attenuation", ["paper", "released"])
@pytest.mark.parametrize("budget", [1, 4])
def test_autocast_stays_near_float32(budget: int, attenuation: str) -> None:
    """As above; measured: at most 1.0%."""
    for seed in range(4):
        model, ids = tiny_model(seed, attenuation=attenuation, budget=budget), random_ids(3, 17, seed)
        expected = model(ids, labels=ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(ids, labels=ids, output_streams=True)
        out.loss.backward()
        assert relative_error(out.logits, expected.logits) < 0.015
        assert all(s.log_score.dtype == torch.float32 for s in out.streams)
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().float() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("routing", GATED)
def test_bfloat16_routes_and_trains(routing: str) -> None:
    model, ids = tiny_model(**routed(routing), budget=1.5).to(torch.bfloat16), random_ids(2, 13)
    out = model(ids, labels=ids, output_streams=True)
    out.loss.backward()
    assert all(s.log_score.dtype == torch.float32 for s in out.streams)
    assert all(s.residual.dtype == torch.bfloat16 for s in out.streams)
    assert out.streams[-1].bubble_sizes().max() > 1
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# --- Loss ---


def test_labels_are_shifted_inside() -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    out = model(ids, labels=ids)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_ignored_labels_do_not_count() -> None:
    model, ids = tiny_model(), random_ids(1, 6)
    labels = torch.tensor([[-100, 3, -100, -100, 7, -100]])
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[0, [0, 3]], torch.tensor([3, 7]))
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("return_logits", [True, False])
def test_labels_outside_the_vocabulary_are_refused_where_they_are_targets(return_logits: bool) -> None:
    model, ids = tiny_model(), random_ids(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    labels = ids.clone()
    # Nobody's target: the first token of a row, and padding.
    labels[:, 0], labels[1, -1] = -1, 99
    assert model(ids, mask, labels=labels, return_logits=return_logits).loss.isfinite()
    labels[1, 2] = -1
    with pytest.raises(RuntimeError, match="labels: expected token ids"):
        model(ids, mask, labels=labels, return_logits=return_logits)


@pytest.mark.parametrize("count", [5, torch.tensor(5)], ids=["int", "tensor"])
def test_num_items_in_batch_divides_the_summed_loss(count: int | Tensor) -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    mean = model(ids, labels=ids).loss
    assert model(ids, labels=ids, num_items_in_batch=count).loss.item() == pytest.approx(mean.item() * 16 / 5, rel=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_loss_skips_padding_and_joins_over_holes(place: str) -> None:
    model, ids = tiny_model(), random_ids(1, 7)
    padded, mask = put_at(ids[0], PLACES[place], 13, filler=4)
    loss = model(padded, attention_mask=mask, labels=padded).loss
    assert loss.item() == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-6)


def test_loss_of_the_mixture() -> None:
    model, ids = tiny_model(merge="probability"), random_ids(2, 9)
    out = model(ids, labels=ids)
    assert torch.allclose(out.logits.logsumexp(-1), torch.zeros(2, 9), atol=1e-5)
    nll = -out.logits[:, :-1].gather(2, ids[:, 1:, None]).mean()
    assert out.loss.item() == pytest.approx(nll.item(), abs=1e-5)


# --- Arguments and outputs ---


@pytest.mark.parametrize("merge", ["residual", "probability"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_logits_to_keep(padding: str, merge: str) -> None:
    model, ids = tiny_model(merge=merge), random_ids(2, 9)
    mask = padding_mask(padding, 2, 9)
    logits = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=3).logits, logits[:, -3:])
    index = torch.tensor([0, 8, 4])
    assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=index).logits, logits[:, index])


@pytest.mark.parametrize("fields", [{}, {"merge": "root"}, {"merge": "probability"}, {"routing": "none"}], ids=str)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_the_loss_without_logits(padding: str, fields: dict[str, Any]) -> None:
    model, ids = tiny_model(**fields).double(), random_ids(2, 9)
    arguments: dict[str, Any] = {"labels": ids, "attention_mask": padding_mask(padding, 2, 9)}
    for more in ({}, {"num_items_in_batch": 3}):
        whole, alone = model(ids, **arguments, **more), model(ids, **arguments, **more, return_logits=False)
        assert alone.logits is None
        torch.testing.assert_close(alone.loss, whole.loss, rtol=1e-12, atol=0)
        parameters = list(model.parameters())
        for ours, theirs in zip(
            *(torch.autograd.grad(out.loss, parameters, allow_unused=True) for out in (alone, whole)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_nothing_to_return() -> None:
    with pytest.raises(ValueError, match="return_logits=False: expected labels"):
        tiny_model()(random_ids(1, 5), return_logits=False)


def test_labels_need_all_logits() -> None:
    ids = random_ids(1, 5)
    for keep in (2, torch.tensor([1])):
        with pytest.raises(ValueError, match=r"logits_to_keep=.*expected 0"):
            tiny_model()(ids, labels=ids, logits_to_keep=keep)


@pytest.mark.parametrize(
    ("name", "value"),
    [("bugdet", 2), ("token_type_ids", torch.zeros(1, 1)), ("head_mask", 0.0), ("cu_seq_lens_q", torch.ones(2))],
    ids=["misspelt", "tensor-of-one-zero", "zero", "lengths"],
)
def test_argument_without_effect_is_refused(name: str, value: Any) -> None:
    for model in (tiny_model(), tiny_model().model):
        with pytest.raises(ValueError, match=f"{name}: not an argument"):
            model(random_ids(1, 5), **{name: value})


def test_arguments_that_ask_for_nothing_are_accepted() -> None:
    model, ids = tiny_model(), random_ids(1, 5)
    out = model(ids, use_cache=False, output_attentions=None, cache=None)
    assert torch.equal(out.logits, model(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": random_ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 16)}, "exactly one of"),
        ({"input_ids": random_ids(1, 3)[0]}, r"input of shape \(3,\): expected rows"),
        ({"input_ids": random_ids(2, 0)}, r"input of shape \(2, 0\): expected rows of at least one token"),
        ({"input_ids": random_ids(1, 513)}, "input of 513 tokens: expected at most max_position_embeddings=512"),
        ({"input_ids": random_ids(2, 3), "attention_mask": torch.ones(2, 4)}, r"attention_mask of shape \(2, 4\)"),
        ({"input_ids": random_ids(2, 3), "budget": 0.5}, r"budget=0.5: expected a number"),
        ({"input_ids": random_ids(2, 3), "budget": True}, r"budget=True: expected a number"),
    ],
    ids=["nothing", "both", "one-dimension", "empty", "too-long", "mask-shape", "budget-low", "budget-bool"],
)
def test_wrong_input_is_a_value_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model()(**arguments)


def test_the_longest_row_is_accepted() -> None:
    assert tiny_model(max_position_embeddings=9)(random_ids(1, 9)).logits.shape == (1, 9, VOCAB)


@pytest.mark.parametrize("padding", ["none", "holes"])
def test_embeddings_in_place_of_ids(padding: str) -> None:
    model, ids, mask = tiny_model(), random_ids(2, 9), padding_mask(padding, 2, 9)
    embeddings = model.get_input_embeddings()(ids)
    expected = model(ids, attention_mask=mask, labels=ids)
    out = model(inputs_embeds=embeddings, attention_mask=mask, labels=ids)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.loss, expected.loss)


@pytest.mark.parametrize("merge", FACTORS["merge"])
def test_gradients_reach_the_embeddings_as_they_reach_the_table(merge: str) -> None:
    model, ids, mask = tiny_model(merge=merge, tie_word_embeddings=False), random_ids(2, 9), padding_mask("left", 2, 9)
    assert mask is not None
    table = model.get_input_embeddings().weight
    embeddings = table.detach()[ids].requires_grad_()
    model(inputs_embeds=embeddings, attention_mask=mask, labels=ids).loss.backward()
    assert table.grad is None
    assert embeddings.grad is not None
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    expected = torch.zeros_like(table).index_add(0, ids.flatten(), embeddings.grad.flatten(0, 1))
    assert torch.allclose(table.grad, expected, rtol=0, atol=1e-6)
    assert expected.abs().max() > 1e-3
    assert not embeddings.grad[mask == 0].any()


def test_embeddings_fill_and_continue_a_cache() -> None:
    model, ids, mask = tiny_model(budget=1.5), random_ids(2, 9), padding_mask("left", 2, 9)
    assert mask is not None
    expected = model(ids, attention_mask=mask).logits
    embeddings = model.get_input_embeddings()(ids).detach()
    first = model(inputs_embeds=embeddings[:, :6], attention_mask=mask[:, :6], use_cache=True)
    rest = model(inputs_embeds=embeddings[:, 6:], attention_mask=mask, cache=first.cache)
    logits = torch.cat([first.logits, rest.logits], dim=1)
    assert torch.allclose(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)


def test_tuple_output() -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    out = model(ids, labels=ids)
    loss, logits = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)


def test_hidden_states_are_the_roots() -> None:
    model, ids, mask = tiny_model(), random_ids(2, 9), padding_mask("left", 2, 9)
    out = model(ids, attention_mask=mask, output_hidden_states=True, output_streams=True)
    assert [h.shape for h in out.hidden_states] == [(2, 9, 16)] * 5
    assert torch.equal(out.hidden_states[0][0], model.get_input_embeddings()(ids[0]))
    for hidden, streams in zip(out.hidden_states, out.streams, strict=True):
        roots = streams.residual[1][streams.is_root[1]]
        assert torch.equal(hidden[1, 3:], roots)


def test_many_fork_layers_do_not_drown_the_merge_in_the_epsilon_of_the_norm() -> None:
    """Gates that begin at one half leave p = 2^-12, whose square times the variance of a residual is far below 1e-5."""
    model = tiny_model(num_hidden_layers=12, fork_layers=list(range(12)), budget=1)
    for gate in model.model.gates.values():
        gate.projection.weight.data.zero_()
    model.model.norm.weight.data.fill_(1)
    model.model.norm.bias.data.zero_()
    out = model.model(random_ids(1, 9))
    p = out.final_streams.log_score.exp()
    assert torch.allclose(p, torch.full_like(p, 2**-12))
    deviation = out.last_hidden_state.std(-1, correction=0)
    assert torch.allclose(deviation, torch.ones_like(deviation), rtol=1e-3, atol=0)


def test_the_merge_of_the_release_multiplies_by_p_alone() -> None:
    model = tiny_model(attenuation="released", budget=2)
    out = model.model(random_ids(2, 9), output_streams=True)
    streams = out.final_streams
    expected = model.model.norm(streams.merge_residuals(streams.log_score.exp()))
    assert torch.equal(out.last_hidden_state, expected)
    shared = model.model.norm(streams.merge_residuals(streams.shares()))
    assert (out.last_hidden_state - shared).abs().max() > 1e-6


def test_last_hidden_state_is_merged_and_normed() -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    assert torch.equal(model.lm_head(model.model(ids).last_hidden_state), model(ids).logits)


def test_streams_are_returned_when_asked_for() -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    assert model(ids).streams is None
    assert model(ids).hidden_states is None
    streams = model(ids, output_streams=True).streams
    assert [s.token.shape[1] for s in streams] == [9, 18, 18, 18, 18]
    assert [s.origin is None for s in streams] == [True, False, False, False, False]
    assert isinstance(streams[0], Streams)


@pytest.mark.parametrize("attenuation", FACTORS["attenuation"])
def test_attenuation_scales_updates_by_p(attenuation: str) -> None:
    """A root whose score all but vanished passes the blocks unchanged, unless attenuation is off."""
    model = tiny_model(attenuation=attenuation, fork_layers=[0], budget=1)
    with torch.no_grad():
        model.model.gates["0"].projection.weight.zero_()
        model.model.gates["0"].norm.weight.zero_()
        model.model.gates["0"].norm.bias.fill_(1)
        model.model.gates["0"].projection.weight[1] = -5  # keep: log sigmoid(-80), held at -20
    streams = model(random_ids(1, 5), output_streams=True).streams
    change = (streams[-1].residual - streams[0].residual).abs().max()
    assert (change > 0.1) if attenuation == "none" else (change < 1e-6)


# --- Dropout and gradient checkpointing ---


def trained_once(model: ThoughtbubblesForCausalLM, ids: Tensor) -> tuple[Tensor, Any, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    out = model(ids, labels=ids, attention_mask=padding_mask("left", *ids.shape), output_streams=True)
    out.loss.backward()
    return out.loss, out.streams, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("routing", ["causal", "topk"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_nothing(dropout: float, routing: str) -> None:
    model = tiny_model(hidden_dropout=dropout, routing=routing, budget=1.5).train()
    ids = random_ids(3, 13)
    loss, streams, gradients = trained_once(model, ids)
    model.gradient_checkpointing_enable()
    loss_again, streams_again, gradients_again = trained_once(model, ids)
    layers = model.config.gated_layers
    assert torch.equal(loss, loss_again)
    assert survivors_of(streams, layers) == survivors_of(streams_again, layers)
    assert gradients.keys() == gradients_again.keys()
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


@pytest.mark.parametrize("block", OTHER_BLOCKS, ids=["llama", "neox", "both"])
def test_other_blocks_recomputed_give_the_same_gradients(block: dict[str, Any]) -> None:
    model, ids = tiny_model(**block).train(), random_ids(2, 9)
    kept = trained_once(model, ids)[2]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    recomputed = trained_once(model, ids)[2]
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.parametrize("block", OTHER_BLOCKS, ids=["llama", "neox", "both"])
def test_other_blocks_are_causal_and_blind_to_padding(block: dict[str, Any]) -> None:
    model, ids = tiny_model(budget=1.5, **block), random_ids(2, 19)
    whole = model(ids).logits
    for length in (1, 7, 18):
        assert torch.allclose(model(ids[:, :length]).logits, whole[:, :length], rtol=0, atol=1e-5)
    for place in PLACES.values():
        padded, mask = put_at(ids[0, :7], place, 13, filler=4)
        assert torch.allclose(
            model(padded, attention_mask=mask).logits[0, list(place)], whole[0, :7], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("block", OTHER_BLOCKS, ids=["llama", "neox", "both"])
def test_other_blocks_in_bfloat16_stay_near_float32(block: dict[str, Any]) -> None:
    model, ids = tiny_model(budget=1, **block), random_ids(3, 17)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(ids).logits
    narrow = model.to(torch.bfloat16)(ids).logits
    for found in (cast, narrow):
        assert (found.float() - expected).norm() < 0.03 * expected.norm()


def test_gradient_checkpointing_recomputes_blocks_but_never_routes_again() -> None:
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    calls: list[str] = []
    for module in model.modules():
        if isinstance(module, ForkGate):
            module.register_forward_hook(lambda *_: calls.append("gate"))
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append("mlp"))
    trained_once(model, random_ids(2, 7))
    assert calls.count("gate") == 2
    assert calls.count("mlp") == 8


def test_dropout_works_in_training_alone() -> None:
    model, ids = tiny_model(hidden_dropout=0.5), random_ids(1, 9)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


# --- Weights ---


def initialised() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 500}
    return dict(ThoughtbubblesForCausalLM(tiny_config(**shape)).named_parameters())


def test_initial_weights_are_normal() -> None:
    into_residual = ("o_proj.weight", "down_proj.weight")
    for name, weight in initialised().items():
        if weight.dim() == 2 and not name.endswith(into_residual):
            tolerance = 0.15 if "gates" in name else 0.03  # 256 numbers and at least 16,384
            assert weight.std().item() == pytest.approx(0.02, rel=tolerance), name


@pytest.mark.parametrize("projection", ["attention.o_proj", "mlp.down_proj"])
def test_initial_projections_into_the_residual_stream_are_smaller(projection: str) -> None:
    weights = initialised()
    for layer in range(4):
        std = weights[f"model.layers.{layer}.{projection}.weight"].std().item()
        assert std == pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.03)


def test_initial_relative_fork_embeddings_are_half_as_large_as_the_residual() -> None:
    config = tiny_config(fork_embedding="relative", hidden_size=512, num_attention_heads=2)
    model = ThoughtbubblesForCausalLM(config)
    for gate in model.model.gates.values():
        assert gate.fork_embedding.std().item() == pytest.approx(0.5, rel=0.1)


def test_initial_fork_embeddings_are_uniform() -> None:
    embeddings = torch.cat([w for name, w in initialised().items() if name.endswith("fork_embedding")])
    assert 0 <= embeddings.min() < 0.1 / math.sqrt(128)
    assert 0.9 / math.sqrt(128) < embeddings.max() < 1 / math.sqrt(128)
    assert embeddings.mean().item() == pytest.approx(0.5 / math.sqrt(128), rel=0.1)


def test_initial_fork_embeddings_are_normal_where_the_configuration_says_so() -> None:
    config = tiny_config(fork_embedding_init="normal", hidden_size=512, num_attention_heads=2)
    torch.manual_seed(0)
    model = ThoughtbubblesForCausalLM(config)
    embeddings = torch.cat([gate.fork_embedding for gate in model.model.gates.values()])
    assert embeddings.std().item() == pytest.approx(1 / math.sqrt(512), rel=0.1)
    assert embeddings.mean().item() == pytest.approx(0, abs=0.2 / math.sqrt(512))


def test_initial_norms_and_biases_do_nothing() -> None:
    for name, weight in initialised().items():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name


def test_initializer_range_scales_the_weights() -> None:
    model = ThoughtbubblesForCausalLM(tiny_config(hidden_size=128, initializer_range=0.1))
    assert model.model.layers[0].attention.qkv_proj.weight.std().item() == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_saving_and_loading(tmp_path: Path, tie: bool) -> None:
    model, ids = tiny_model(tie_word_embeddings=tie, budget="4/3"), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert len(stored & {"lm_head.weight", "model.embed_tokens.weight"}) == (1 if tie else 2)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is ThoughtbubblesForCausalLM
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_loading_without_the_unembedding(tmp_path: Path) -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    base: Any = AutoModel.from_pretrained(tmp_path)
    assert type(base) is ThoughtbubblesModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_embeddings_are_tied() -> None:
    model = tiny_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_resizing_the_vocabulary(tie: bool) -> None:
    model, ids = tiny_model(tie_word_embeddings=tie), random_ids(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(25)
    out = model(ids, labels=ids)
    assert out.logits.shape == (2, 9, 25)
    assert torch.allclose(out.logits[..., :VOCAB], before, rtol=0, atol=1e-5)
    assert out.loss.isfinite()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


# --- Generation ---


def generate(model: Any, ids: Tensor, steps: int, **arguments: Any) -> Tensor:
    """`model.generate` from the most probable tokens, recomputing every prefix."""
    settings = {"max_new_tokens": steps, "do_sample": False, "use_cache": False, **arguments}
    generated: Tensor = model.generate(ids, **settings)
    return generated


def greedy(model: nn.Module, ids: Tensor, steps: int, budget: Any = None) -> list[int]:
    """The tokens that follow one row, from the logits of ever longer prefixes."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, budget=budget).logits[:, -1:].argmax(-1)], dim=1)
    return [int(token) for token in ids[0]]


@pytest.mark.parametrize("budget", [None, 1, 3.25])
@pytest.mark.parametrize("routing", ["causal", "topk", "none"])
def test_greedy_generation(routing: str, budget: float | None) -> None:
    model, ids = tiny_model(routing=routing, budget=1.5), random_ids(1, 5)
    arguments = {} if budget is None else {"budget": budget}
    generated = generate(model, ids, 8, **arguments)
    assert generated[0].tolist() == greedy(model, ids, 8, budget)


def test_budget_reaches_generation() -> None:
    """The test above could not tell otherwise if the budget made no difference."""
    texts = {tuple(greedy(tiny_model(), random_ids(1, 5), 8, budget)) for budget in (1, 1.5, 3.25)}
    assert len(texts) > 1


def test_left_padded_batches_generate_as_each_row_alone() -> None:
    model = tiny_model(budget=1.5)
    ids, mask = random_ids(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    generated = generate(model, ids, 8, attention_mask=mask)
    assert generated[0].tolist() == greedy(model, ids[:1], 8)
    assert generated[1, 3:].tolist() == greedy(model, ids[1:, 3:], 8)


def test_beam_search_runs_without_a_cache() -> None:
    model = tiny_model(budget=1.5)
    generated = generate(model, random_ids(2, 5), 4, num_beams=3)
    assert generated.shape == (2, 9)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("routing", ["causal", "none"])
def test_generation_from_embeddings(routing: str, beams: int, use_cache: bool) -> None:
    model: Any = tiny_model(routing=routing, budget=1.5)
    ids = random_ids(2, 7, seed=1)  # whose rows begin with two tokens that differ: equal ones tie
    embeddings = model.get_input_embeddings()(ids).detach()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "use_cache": use_cache}
    for padding in ({}, {"attention_mask": mask}):
        expected = model.generate(ids, **padding, **arguments)
        generated = model.generate(inputs_embeds=embeddings, **padding, **arguments)
        assert torch.equal(generated, expected[:, 7:])
        assert torch.equal(model.generate(ids, inputs_embeds=embeddings, **padding, **arguments), expected)


def test_generation_reads_the_embeddings() -> None:
    model: Any = tiny_model()
    embeddings = model.get_input_embeddings()(random_ids(1, 7)).detach()
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    generated = [model.generate(inputs_embeds=e, **arguments) for e in (embeddings, embeddings.flip(2))]
    assert not torch.equal(*generated)


def test_budget_reaches_generation_from_embeddings() -> None:
    model: Any = tiny_model()
    ids = random_ids(1, 5)
    embeddings = model.get_input_embeddings()(ids).detach()
    for budget in (1, 3.25):
        generated = model.generate(inputs_embeds=embeddings, budget=budget, max_new_tokens=8, do_sample=False)
        assert [*ids[0].tolist(), *generated[0].tolist()] == greedy(model, ids, 8, budget)


def test_topk_generates_from_embeddings_with_a_cache_alone() -> None:
    """transformers sets use_cache there without a word, which would change the routing."""
    model: Any = tiny_model(routing="topk", budget=1.5)
    ids = random_ids(1, 7)
    embeddings = model.get_input_embeddings()(ids).detach()
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    generated = model.generate(inputs_embeds=embeddings, **arguments)
    assert torch.equal(generated, model.generate(ids, **arguments)[:, 7:])
    for given in ({"inputs_embeds": embeddings}, {"inputs": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="use_cache=False with inputs_embeds: expected input_ids"):
            model.generate(**given, use_cache=False, **arguments)


def test_a_model_built_from_a_preset_runs() -> None:
    model = random_model(ThoughtbubblesConfig.preset("nano", vocab_size=VOCAB, num_hidden_layers=5))
    out = model(random_ids(1, 5), budget=Fraction(3, 2), output_streams=True)
    assert out.streams[-1].token.shape == (1, 7)
