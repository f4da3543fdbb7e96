"""The reference itself, by values worked by hand and by the authors' own numbers."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thoughtbubbles.model.reference import (
    ReferenceOutput,
    _rotate,
    bubble_positions,
    reference_forward,
    rotary_frequencies,
    route_causal,
    route_topk,
)

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
GOLDEN_NAMES = ["released-dense", "released-k2-residual", "released-k3-rightmost", "released-k4-residual"]


@dataclass
class Config:
    vocab_size: int = 13
    hidden_size: int = 8
    num_hidden_layers: int = 3
    num_loops: int = 1
    num_attention_heads: int = 2
    intermediate_size: int = 16
    hidden_act: str = "gelu"
    use_bias: bool = True
    layer_norm_eps: float = 1e-5
    num_key_value_heads: int = 2
    head_dim: int = 4
    norm: str = "layernorm"
    mlp: str = "plain"
    qk_norm: bool = False
    parallel_residual: bool = False
    partial_rotary_factor: float = 1.0
    rope_parameters: dict[str, Any] | None = None
    rope_theta: float = 10000.0
    fork_layers: list[int] = field(default_factory=lambda: [0, 1])
    budget: int | float | str | Fraction = 1.5
    routing: str = "causal"
    gate_scores: str = "learned"
    fork_embedding: str = "absolute"
    fork_content: str = "embedding"
    attenuation: str = "paper"
    merge: str = "residual"
    random_rule: str = "causal"
    routing_seed: int = 0
    copy_layer: int = 0


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter."""
    d, inner = config.hidden_size, config.intermediate_size
    linears = {"attention.qkv_proj": (3 * d, d), "attention.o_proj": (d, d)}
    linears |= {"mlp.up_proj": (inner, d), "mlp.down_proj": (d, inner)}
    norms = ["model.norm", *(f"model.gates.{i}.norm" for i in config.fork_layers)]
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for i in range(config.num_hidden_layers):
        norms += [f"model.layers.{i}.attention_norm", f"model.layers.{i}.mlp_norm"]
        for name, shape in linears.items():
            result[f"model.layers.{i}.{name}.weight"] = shape
            result[f"model.layers.{i}.{name}.bias"] = shape[:1]
    for i in config.fork_layers:
        result[f"model.gates.{i}.projection.weight"] = (2, d)
        result[f"model.gates.{i}.fork_embedding"] = (d,)
    for name in norms:
        result |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    return result


def random_parameters(config: Config, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes(config).items()
    }


def transparent_parameters(config: Config, fork_gate: float, keep_gate: float) -> dict[str, Tensor]:
    """Blocks that change nothing, LayerNorms without gain, and gates that are the same for every stream."""
    parameters = random_parameters(config)
    for name, value in parameters.items():
        if ".layers." in name or "norm" in name:
            value.zero_()
        if "norm.weight" in name and "gates" not in name:
            value.fill_(1.0)
    for i in config.fork_layers:
        parameters[f"model.gates.{i}.norm.bias"][0] = 1.0
        parameters[f"model.gates.{i}.projection.weight"][:, 0] = torch.tensor([fork_gate, keep_gate])
    return parameters


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def close(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> bool:
    return torch.allclose(actual, expected, rtol=0, atol=atol)


def stream_tokens(output: ReferenceOutput, row: int, boundary: int) -> list[int]:
    return [stream.token for stream in output.states[row][boundary]]


# --- Routing ---


def first_layer(*fork_scores: float) -> tuple[list[float], list[int], list[bool]]:
    """Candidates of the first fork layer: one stream a token, all keeps certain."""
    scores = [score for fork in fork_scores for score in (fork, 0.0)]
    tokens = [token for token in range(len(fork_scores)) for _ in range(2)]
    return scores, tokens, [True, False] * len(fork_scores)


def surviving_forks(survive: list[bool]) -> list[int]:
    assert all(survive[1::2])
    return [token for token, fork in enumerate(survive[::2]) if fork]


class TestCausal:
    def test_credit_goes_to_the_earlier_of_two_eligible_forks(self) -> None:
        # kappa 3/2 allows 0, 1, 1, 2. Each score beats all before it, so tokens 1, 2, 3 are eligible
        # (token 0 is not: 0 < 0 fails); token 1 takes the first credit, token 2 finds none, 3 the second.
        candidates = first_layer(-0.9, -0.5, -0.2, -0.1)
        assert surviving_forks(route_causal(*candidates, Fraction("1.5"))) == [1, 3]

    def test_a_fork_that_cannot_survive_still_outranks_later_ones(self) -> None:
        # Token 0 has no allowance, yet its greater score counts against tokens 1 and 2; token 3 is fourth.
        candidates = first_layer(-0.1, -0.5, -0.2, -0.9)
        assert surviving_forks(route_causal(*candidates, Fraction("1.5"))) == []

    def test_within_a_token_the_greater_score_is_visited_first(self) -> None:
        # Token 1 (two streams) offers 3 optional candidates; kappa 3/2 allows one by token 1.
        scores, tokens = [-9.0, 0.0, -3.0, -1.0, -2.0, 0.0], [0, 0, 1, 1, 1, 1]
        optional = [True, False, True, True, True, False]
        survive = route_causal(scores, tokens, optional, Fraction("1.5"))
        assert survive == [False, True, False, True, False, True]

    def test_ties_are_leftmost_first(self) -> None:
        # Between tokens: token 0 outranks token 1 without being admissible.
        assert surviving_forks(route_causal(*first_layer(-1.0, -1.0), Fraction("1.5"))) == []
        # Within a token: kappa 2 allows one optional candidate of the only token.
        survive = route_causal([-1.0] * 4, [0] * 4, [True, True, True, False], Fraction(2))
        assert survive == [True, False, False, True]

    def test_floor_of_a_fifth_of_five_is_one(self) -> None:
        assert math.floor((1.2 - 1) * 5) == 0  # what floats would say
        candidates = first_layer(-5.0, -4.0, -3.0, -2.0, -1.0)
        assert surviving_forks(route_causal(*candidates, Fraction("1.2"))) == [4]

    def test_kappa_one_admits_nothing(self) -> None:
        assert surviving_forks(route_causal(*first_layer(-0.3, -0.2, -0.1), Fraction(1))) == []

    def test_kappa_two_keeps_every_candidate_of_the_first_fork_layer(self) -> None:
        candidates = first_layer(-0.3, -0.1, -0.2)
        assert surviving_forks(route_causal(*candidates, Fraction(2))) == [0, 1, 2]


class TestTopk:
    def test_differs_from_causal(self) -> None:
        # ceil(1.5 * 4) = 6: four roots and the two best forks, wherever they stand.
        candidates = first_layer(-0.9, -0.5, -0.2, -0.1)
        assert surviving_forks(route_topk(*candidates, Fraction("1.5"))) == [2, 3]

    def test_rounds_up(self) -> None:
        # ceil(1.2 * 3) = 4
        assert surviving_forks(route_topk(*first_layer(-0.2, -0.1, -0.3), Fraction("1.2"))) == [1]

    def test_ties_are_leftmost_first(self) -> None:
        assert surviving_forks(route_topk(*first_layer(-1.0, -1.0, -1.0, -1.0), Fraction("1.5"))) == [0, 1]

    def test_the_root_of_a_row_of_one_token_survives_a_better_fork(self) -> None:
        assert route_topk([-0.1, -7.0], [0, 0], [True, False], Fraction(1)) == [False, True]

    def test_looks_at_later_tokens(self) -> None:
        budget = Fraction("1.5")
        assert surviving_forks(route_topk(*first_layer(-0.5, -0.6), budget)) == [0]
        assert surviving_forks(route_topk(*first_layer(-0.5, -0.6, -0.1, -0.1), budget)) == [2, 3]


@st.composite
def candidate_rows(draw: st.DrawFn) -> tuple[list[float], list[int], list[bool]]:
    """A row of bubbles before some fork layer; few distinct scores, so that ties are common."""
    bubble_sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
    tokens = [token for token, size in enumerate(bubble_sizes) for _ in range(2 * size)]
    optional = [choice for size in bubble_sizes for choice in [*[True] * (2 * size - 1), False]]
    score = st.sampled_from([-3.0, -2.0, -1.5, -1.0, -0.5])
    scores = draw(st.lists(score, min_size=len(tokens), max_size=len(tokens)))
    return scores, tokens, optional


budgets = st.sampled_from([Fraction(text) for text in ("1", "1.1", "1.2", "1.5", "2", "2.7", "4", "8")])


@given(candidate_rows(), budgets)
def test_causal_keeps_every_prefix_within_its_budget(
    row: tuple[list[float], list[int], list[bool]], budget: Fraction
) -> None:
    _, tokens, optional = row
    survive = route_causal(*row, budget)
    assert all(survive[c] for c in range(len(tokens)) if not optional[c])
    for prefix in range(1, max(tokens) + 2):
        alive = sum(survive[c] for c in range(len(tokens)) if tokens[c] < prefix)
        assert alive <= math.floor(budget * prefix)


@given(candidate_rows(), candidate_rows(), budgets)
def test_causal_does_not_depend_on_the_suffix(
    row: tuple[list[float], list[int], list[bool]],
    suffix: tuple[list[float], list[int], list[bool]],
    budget: Fraction,
) -> None:
    scores, tokens, optional = row
    later = [max(tokens) + 1 + token for token in suffix[1]]
    longer = route_causal(scores + suffix[0], tokens + later, optional + suffix[2], budget)
    assert longer[: len(scores)] == route_causal(scores, tokens, optional, budget)


@given(candidate_rows(), budgets)
def test_causal_keeps_all_where_the_allowance_covers_all(
    row: tuple[list[float], list[int], list[bool]], budget: Fraction
) -> None:
    _, tokens, optional = row
    covered = all(
        sum(optional[c] for c in range(len(tokens)) if tokens[c] <= t) <= math.floor((budget - 1) * (t + 1))
        for t in range(max(tokens) + 1)
    )
    if covered:
        assert all(route_causal(*row, budget))


@given(candidate_rows(), budgets)
def test_topk_keeps_the_roots_and_fills_the_budget(
    row: tuple[list[float], list[int], list[bool]], budget: Fraction
) -> None:
    scores, _, optional = row
    survive = route_topk(*row, budget)
    assert all(survive[c] for c in range(len(scores)) if not optional[c])
    tokens_in_row = optional.count(False)
    assert sum(survive) == min(len(scores), math.ceil(budget * tokens_in_row))
    admitted = [scores[c] for c in range(len(scores)) if optional[c] and survive[c]]
    refused = [scores[c] for c in range(len(scores)) if optional[c] and not survive[c]]
    assert not admitted or not refused or min(admitted) >= max(refused)


# --- Positions ---


def test_a_bubble_divides_the_step_before_its_root() -> None:
    thirds = [1 + Fraction(1, 3), 1 + Fraction(2, 3), 2]
    assert bubble_positions([0, 0, 1, 2, 2, 2]) == [Fraction(-1, 2), 0, 1, *thirds]
    assert bubble_positions([0, 0, 1], origin=1) == [Fraction(1, 2), 1, 2]


def test_rotation_pairs_a_channel_with_the_one_half_a_head_further() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    # Pairs (0, 2) and (1, 3).
    expected = [math.cos(0.5), -math.sin(0.05), math.sin(0.5), math.cos(0.05)]
    assert close(_rotate(x, Fraction(1, 2), [1.0, 0.1]), torch.tensor([expected], dtype=torch.float64))
    assert close(_rotate(x, Fraction(1, 2), [1.0, 0.1], 2.0), 2 * torch.tensor([expected], dtype=torch.float64))


def test_rotation_of_a_part_leaves_the_other_channels() -> None:
    x = torch.tensor([[1.0, 0.0, 5.0, 6.0, 7.0]], dtype=torch.float64)
    expected = [math.cos(0.5), math.sin(0.5), 5.0, 6.0, 7.0]
    assert close(_rotate(x, Fraction(1, 2), [1.0]), torch.tensor([expected], dtype=torch.float64))


def test_rotary_frequencies_of_one_example_each() -> None:
    def frequencies(**rope: Any) -> list[float]:
        return rotary_frequencies(Config(head_dim=4, rope_theta=100.0, rope_parameters=rope or None))[0]

    assert frequencies() == pytest.approx([1.0, 0.1])
    assert frequencies(rope_type="linear", factor=4.0) == pytest.approx([0.25, 0.025])
    # In rows of 20 pi tokens the first pair turns 10 times, the second once: half way from 0.5 to 1.5.
    llama3 = {"low_freq_factor": 0.5, "high_freq_factor": 1.5, "original_max_position_embeddings": 20 * math.pi}
    assert frequencies(rope_type="llama3", factor=4.0, **llama3) == pytest.approx([1.0, 0.1 * (0.5 + 0.125)])
    # Pair 0 turns 10 times, pair 2 would turn 1 / 10 times, and pair 1 is half way.
    yarn = {"beta_fast": 10.0, "beta_slow": 0.1, "truncate": False, "original_max_position_embeddings": 20 * math.pi}
    assert frequencies(rope_type="yarn", factor=4.0, **yarn) == pytest.approx([1.0, 0.1 * (0.5 + 0.125)])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, 1 + 0.1 * math.log(4)),
        ({"attention_factor": 0.7}, 0.7),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (1 + 0.2 * math.log(4)) / (1 + 0.05 * math.log(4))),
    ],
    ids=str,
)
def test_factor_of_yarn(more: dict[str, float], expected: float) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **more}
    assert rotary_frequencies(Config(rope_parameters=rope))[1] == pytest.approx(expected)
    assert rotary_frequencies(Config())[1] == 1


# --- Gate, attenuation, merge: models whose numbers can be written down ---


def test_forks_stand_left_of_their_source_with_the_embedding_and_their_own_score() -> None:
    config = Config(num_hidden_layers=1, fork_layers=[0], budget=2)
    parameters = transparent_parameters(config, fork_gate=-1.0, keep_gate=2.0)
    output = reference_forward(config, parameters, torch.tensor([[3, 7]]))
    fork, root = output.states[0][0][2:]
    embedded = parameters["model.embed_tokens.weight"][7]
    assert close(fork.residual, embedded + parameters["model.gates.0.fork_embedding"])
    assert close(root.residual, embedded)
    assert math.isclose(fork.log_score.item(), math.log(sigmoid(-1.0)))
    assert math.isclose(root.log_score.item(), math.log(sigmoid(2.0)))
    assert [stream.is_root for stream in output.states[0][0]] == [False, True] * 2
    assert output.forks[0][0].survivors == [0, 1, 2, 3]


def test_scores_accumulate_and_each_gate_is_floored() -> None:
    config = Config(fork_layers=[0, 2], budget=4)
    parameters = transparent_parameters(config, fork_gate=-1000.0, keep_gate=2.0)
    output = reference_forward(config, parameters, torch.tensor([[3]]))
    keep = math.log(sigmoid(2.0))
    expected = torch.tensor([-40, -20 + keep, keep - 20, 2 * keep], dtype=torch.float64)
    assert close(output.forks[0][2].candidate_scores, expected)


@pytest.mark.parametrize("merge", ["residual", "residual-normed", "probability", "root"])
@pytest.mark.parametrize(
    ("attenuation", "budget", "weighted"),
    [
        ("paper", 2, True),
        ("none", 2, True),
        ("released", 2, True),
        ("released", 1, False),
        ("paper", 1, True),
    ],
)
def test_merge_of_a_known_bubble(merge: str, attenuation: str, budget: int, weighted: bool) -> None:
    config = Config(num_hidden_layers=1, fork_layers=[0], budget=budget, merge=merge, attenuation=attenuation)
    parameters = transparent_parameters(config, fork_gate=-1.0, keep_gate=2.0)
    output = reference_forward(config, parameters, torch.tensor([[3, 7]]))
    embedding = parameters["model.embed_tokens.weight"]
    streams = [(embedding[7], sigmoid(2.0) if weighted else 1.0)]
    if budget == 2:
        streams.insert(0, (embedding[7] + parameters["model.gates.0.fork_embedding"], sigmoid(-1.0)))
    if merge == "root":
        expected = embedding @ norm(embedding[7])
    elif merge == "residual":
        total = 1 if attenuation == "released" else sum(p for _, p in streams)
        expected = embedding @ norm(sum((p / total * x for x, p in streams), torch.zeros(8)))
    elif merge == "residual-normed":
        expected = embedding @ sum((p * norm(x) for x, p in streams), torch.zeros(8))
    else:
        total = sum(p for _, p in streams)
        expected = sum((p / total * (embedding @ norm(x)).softmax(0) for x, p in streams), torch.zeros(13)).log()
    assert close(output.logits[0, 1], expected)


@pytest.mark.parametrize(
    ("routing", "budget", "weighted"), [("causal", 1, False), ("topk", 1, False), ("causal", 1.2, True)]
)
def test_released_weighting_is_skipped_at_budget_1_alone(routing: str, budget: float, weighted: bool) -> None:
    # At 1.2 the causal rule has no room for a fork among so few tokens, and weighs all the same.
    config = Config(num_hidden_layers=1, fork_layers=[0], budget=budget, routing=routing)
    config.attenuation, config.merge = "released", "residual-normed"
    parameters = transparent_parameters(config, fork_gate=-1.0, keep_gate=2.0)
    ids, mask = torch.tensor([[3, 7, 1, 0]]), torch.tensor([[1, 1, 0, 0]])
    output = reference_forward(config, parameters, ids, mask)
    embedding = parameters["model.embed_tokens.weight"]
    expected = embedding @ norm(embedding[3]) * (sigmoid(2.0) if weighted else 1.0)
    assert close(output.logits[0, 0], expected)


@pytest.mark.parametrize("attenuation", ["paper", "released", "none"])
def test_attention_of_equal_queries_weighs_by_score_alone(attenuation: str) -> None:
    config = Config(num_hidden_layers=1, num_attention_heads=2, fork_layers=[0], attenuation=attenuation)
    config.budget = 2
    parameters = transparent_parameters(config, fork_gate=-1.0, keep_gate=2.0)
    parameters["model.layers.0.attention.qkv_proj.weight"][16:] = torch.eye(8, dtype=torch.float64)
    parameters["model.layers.0.attention.o_proj.weight"].copy_(torch.eye(8, dtype=torch.float64))
    output = reference_forward(config, parameters, torch.tensor([[3, 7]]))
    before, after = output.states[0]
    for index in range(4):
        seen = before[: index + 1]
        p = torch.stack([stream.log_score for stream in seen]).exp()
        values = torch.stack([norm(stream.residual) for stream in seen])
        # Queries and keys are 0 (but for the released code's channel): p is all that the softmax sees.
        expected = {
            "paper": p[-1] * ((p / p.sum()) @ (p[:, None] * values)),
            "released": p[-1] * ((p**0.5 / (p**0.5).sum()) @ (p[:, None] * values)),  # K = 4
            "none": values.mean(dim=0),
        }[attenuation]
        assert close(after[index].residual, before[index].residual + expected)


def test_mlp_update_is_attenuated() -> None:
    config = Config(num_hidden_layers=1, fork_layers=[0], budget=1)
    parameters = transparent_parameters(config, fork_gate=-1.0, keep_gate=2.0)
    parameters["model.layers.0.mlp.down_proj.bias"].fill_(1.0)
    before, after = reference_forward(config, parameters, torch.tensor([[3]])).states[0]
    assert close(after[0].residual, before[0].residual + sigmoid(2.0))


# --- The whole forward ---


def test_rows_do_not_feel_padding_or_each_other() -> None:
    config = Config()
    parameters = random_parameters(config)
    tokens, other = [5, 1, 9, 2, 12], [4, 4, 8]
    alone = reference_forward(config, parameters, torch.tensor([tokens]), labels=torch.tensor([tokens]))
    ids = torch.tensor([[0, 5, 1, 0, 9, 2, 12, 0], [*other, 0, 0, 0, 0, 0], [0] * 8])
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0, 0], [0] * 8])
    batch = reference_forward(config, parameters, ids, mask, labels=ids)
    assert torch.equal(batch.logits[0, mask[0].bool()], alone.logits[0])
    assert not batch.logits[~mask.bool()].any()
    assert batch.states[2] == [[]] * 4
    assert batch.forks[2][0].survivors == []
    pair = reference_forward(config, parameters, torch.tensor([other]), labels=torch.tensor([other]))
    assert alone.loss is not None
    assert pair.loss is not None
    assert batch.loss is not None
    assert close(batch.loss, (4 * alone.loss + 2 * pair.loss) / 6)


def test_labels_of_minus_100_and_the_first_label_are_ignored() -> None:
    config = Config()
    ids = torch.tensor([[5, 1, 9, 2]])
    labels = torch.tensor([[11, -100, 9, -100]])
    output = reference_forward(config, random_parameters(config), ids, labels=labels)
    assert output.loss is not None
    assert close(output.loss, F.cross_entropy(output.logits[0, 1], torch.tensor(9)))


@pytest.mark.parametrize("budget", [1.2, 1.5, 2, 3])
def test_causal_prefixes_run_alone_give_the_same_logits(budget: float) -> None:
    config = Config(budget=budget)
    parameters = random_parameters(config)
    ids = torch.randint(0, 13, (1, 9), generator=torch.Generator().manual_seed(1))
    whole = reference_forward(config, parameters, ids)
    for prefix in range(1, 9):
        part = reference_forward(config, parameters, ids[:, :prefix])
        assert close(part.logits[0], whole.logits[0, :prefix])
        for boundary in range(4):
            alive = [token for token in stream_tokens(whole, 0, boundary) if token < prefix]
            assert len(alive) <= math.floor(Fraction(str(budget)) * prefix)


def test_budget_argument_replaces_the_one_of_the_config() -> None:
    ids = torch.tensor([[5, 1, 9, 2]])
    parameters = random_parameters(Config())
    dialled = reference_forward(Config(budget=1), parameters, ids, budget="3")
    assert torch.equal(dialled.logits, reference_forward(Config(budget=3.0), parameters, ids).logits)
    assert len(dialled.states[0][-1]) > 4


def test_routing_none_is_a_dense_decoder_whatever_the_attenuation() -> None:
    ids = torch.tensor([[5, 1, 9, 2]])
    config = Config(routing="none")
    parameters = {k: v for k, v in random_parameters(config).items() if "gates" not in k}
    logits = [
        reference_forward(replace(config, attenuation=attenuation), parameters, ids).logits
        for attenuation in ("paper", "released", "none")
    ]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_given_survivors_replace_the_router() -> None:
    config = Config(budget=2)
    parameters = random_parameters(config)
    ids = torch.tensor([[5, 1, 9]])
    own = reference_forward(config, parameters, ids)
    survivors = [{layer: fork.survivors for layer, fork in own.forks[0].items()}]
    again = reference_forward(config, parameters, ids, budget=1, survivors=survivors)
    assert torch.equal(own.logits, again.logits)
    roots_only = reference_forward(config, parameters, ids, survivors=[{0: [5, 1, 3], 1: [1, 3, 5]}])
    assert torch.equal(roots_only.logits, reference_forward(config, parameters, ids, budget=1).logits)
    with pytest.raises(ValueError, match="root's keep"):
        reference_forward(config, parameters, ids, survivors=[{0: [0, 1, 3], 1: [1, 3, 5]}])


@pytest.mark.parametrize("name", ["routing", "attenuation", "merge", "hidden_act"])
def test_unknown_choices_are_refused(name: str) -> None:
    config = Config()
    setattr(config, name, "other")
    with pytest.raises(ValueError, match=name):
        reference_forward(config, {}, torch.tensor([[1]]))


def test_a_budget_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="budget"):
        reference_forward(Config(), {}, torch.tensor([[1]]), budget=0.9)


@pytest.mark.parametrize("merge", ["residual", "residual-normed", "probability", "root"])
def test_gradients_agree_with_finite_differences(merge: str) -> None:
    config = Config(num_hidden_layers=2, budget=2, merge=merge)
    parameters = random_parameters(config)
    ids = torch.tensor([[5, 1, 9]])
    forks = reference_forward(config, parameters, ids).forks[0]
    survivors = [{layer: fork.survivors for layer, fork in forks.items()}]
    names = ["model.gates.0.projection.weight", "model.gates.1.norm.bias", "model.gates.1.fork_embedding"]

    def loss(*values: Tensor) -> Tensor:
        moved = parameters | dict(zip(names, values, strict=True))
        result = reference_forward(config, moved, ids, labels=ids, survivors=survivors).loss
        assert result is not None
        return result

    assert torch.autograd.gradcheck(loss, [parameters[name].clone().requires_grad_() for name in names])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), budgets, st.sampled_from(["causal", "topk"]))
def test_every_token_keeps_exactly_one_root_at_its_right_end(tokens: list[int], budget: Fraction, routing: str) -> None:
    config = Config(budget=budget, routing=routing)
    output = reference_forward(config, random_parameters(config), torch.tensor([tokens]))
    for state in output.states[0]:
        ordinals = [stream.token for stream in state]
        assert ordinals == sorted(ordinals)
        rightmost = [i for i in range(len(state)) if i + 1 == len(state) or ordinals[i + 1] > ordinals[i]]
        assert [i for i, stream in enumerate(state) if stream.is_root] == rightmost
        assert sorted(set(ordinals)) == list(range(len(tokens)))


# --- The authors' release ---

RELEASED_NAMES = {
    "attn.c_attn": "layers.{}.attention.qkv_proj",
    "attn.c_proj": "layers.{}.attention.o_proj",
    "ln_1": "layers.{}.attention_norm",
    "ln_2": "layers.{}.mlp_norm",
    "mlp.c_fc": "layers.{}.mlp.up_proj",
    "mlp.c_proj": "layers.{}.mlp.down_proj",
    "forking_ln": "gates.{}.norm",
    "forking_score": "gates.{}.projection",
    "fork_embedding": "gates.{}.fork_embedding",
}


def our_name(released: str) -> str:
    """Map a parameter name of the release to ours; no tensor needs a permutation."""
    if released == "transformer.wte.weight":
        return "model.embed_tokens.weight"
    if released.startswith("transformer.ln_f."):
        return released.replace("transformer.ln_f", "model.norm")
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+?)(\.weight|\.bias)?", released)
    assert match is not None, released
    return "model." + RELEASED_NAMES[match[2]].format(match[1]) + (match[3] or "")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Vectors this small spend their time waiting for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.data
@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden files of the release are not at {GOLDEN}")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_parity_with_the_release(name: str) -> None:
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    meta: dict[str, Any] = json.loads(bytes(golden["meta"].tolist()))
    config = Config(
        vocab_size=meta["vocab_size"],
        hidden_size=meta["hidden_size"],
        num_hidden_layers=meta["num_hidden_layers"],
        num_attention_heads=meta["num_attention_heads"],
        num_key_value_heads=meta["num_attention_heads"],
        head_dim=meta["hidden_size"] // meta["num_attention_heads"],
        intermediate_size=4 * meta["hidden_size"],
        fork_layers=meta["fork_layers"],
        budget=meta["budget"],
        routing="topk",
        attenuation="released",
        merge={"residual": "residual-normed", "rightmost": "root"}[meta["averaging"]],
    )
    parameters = {
        our_name(key.removeprefix("param:")): value.double().requires_grad_()
        for key, value in golden.items()
        if key.startswith("param:")
    }
    # Theirs stand at the position that predicts them, -1 ignored; the last position predicts one too, which
    # labels that are shifted inside cannot say: their loss is computed from the logits.
    targets = golden["labels"].masked_fill(golden["labels"] == -1, -100)
    labels = torch.cat([torch.full_like(targets[:, :1], -100), targets[:, :-1]], dim=1)
    output = reference_forward(config, parameters, golden["input_ids"], labels=labels)

    assert close(output.logits, golden["logits"].double(), atol=1e-5)
    loss = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    assert close(loss, golden["loss"].double(), atol=1e-5)
    all_but_last = F.cross_entropy(golden["logits"][:, :-1].flatten(0, 1), targets[:, :-1].flatten())
    assert output.loss is not None
    assert close(output.loss, all_but_last.double(), atol=1e-5)

    for layer in config.fork_layers:
        for row, states in enumerate(output.states):
            assert stream_tokens(output, row, layer) == golden[f"token_index:{layer}"][row].tolist()
            scores = torch.stack([stream.log_score for stream in states[layer]])
            assert close(scores, golden[f"scores:{layer}"][row].double(), atol=1e-5)

    loss.backward()
    gradients = {key.removeprefix("grad:"): value for key, value in golden.items() if key.startswith("grad:")}
    assert {our_name(key) for key in gradients} == set(parameters)
    for key, theirs in gradients.items():
        ours = parameters[our_name(key)].grad
        assert ours is not None, key
        assert (ours - theirs.double()).norm() <= 1e-4 * theirs.double().norm(), key
