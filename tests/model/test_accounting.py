"""Accounting against what torch counts and keeps: FLOPs, parameters, saved activations, bytes of caches."""

import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import LLAMA, NEOX, randomise
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.model.accounting import (
    activation_bytes,
    cache_bytes,
    count_parameters,
    decoding_flops,
    dense_twin,
    forward_flops,
    layer_widths,
    parameter_counts,
    process_bytes,
    state_bytes,
    tokens_at_equal_flops,
    training_flops,
)
from thoughtbubbles.model.attention import attenuated_width
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.configuration import MERGES, PRESETS
from thoughtbubbles.model.memory import BLOCK
from thoughtbubbles.model.rules import RULES

SHAPE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "fork_layers": [1, 2]}
GATED = ("causal", "threshold", "topk", "random", "uniform")
SPENDING = [
    *((routing, budget) for routing in (*GATED, "none") for budget in (1, 1.2, 2, 4)),
    *((routing, budget) for routing in ("copy", "pause") for budget in (1, 2, 3)),
]


@pytest.mark.parametrize("routing", RULES)
@pytest.mark.parametrize(
    "overrides",
    [{}, {"use_bias": False}, {"tie_word_embeddings": False}, {"fork_content": "attended"}, LLAMA, NEOX],
    ids=str,
)
def test_parameters_are_those_of_the_model(routing: str, overrides: dict[str, Any]) -> None:
    config = ThoughtbubblesConfig(**SHAPE, routing=routing, **overrides)
    model = ThoughtbubblesForCausalLM(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("mlp", ["plain", "gated"])
@pytest.mark.parametrize("part", ["attention_bias", "attention_output_bias", "mlp_bias"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_parameters_of_biases(use_bias: bool, part: str, mlp: str) -> None:
    fields: dict[str, Any] = {part: not use_bias, "use_bias": use_bias, "mlp": mlp, "head_dim": 10}
    config = ThoughtbubblesConfig(**SHAPE, num_key_value_heads=1, **fields)
    with torch.device("meta"):
        model = ThoughtbubblesForCausalLM(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    assert parameter_counts(config).gates == sum(parameter.numel() for parameter in model.model.gates.parameters())


@pytest.mark.parametrize("scores", ["learned", "forks", "fixed"])
def test_parameters_of_gates_with_a_start(scores: str) -> None:
    config = ThoughtbubblesConfig(**SHAPE, gate_scores=scores, gate_start=0.1)
    model = ThoughtbubblesForCausalLM(config)
    assert parameter_counts(config).gates == sum(parameter.numel() for parameter in model.model.gates.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets(name: str) -> None:
    config = ThoughtbubblesConfig.preset(name)
    with torch.device("meta"):
        model = ThoughtbubblesForCausalLM(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_parameters_by_part() -> None:
    config = ThoughtbubblesConfig(**SHAPE)
    parts = parameter_counts(config)
    model = ThoughtbubblesForCausalLM(config)
    assert parts.gates == sum(parameter.numel() for parameter in model.model.gates.parameters())
    assert parts.embedding == model.model.embed_tokens.weight.numel()
    assert parts.total == count_parameters(config)
    assert parameter_counts(dense_twin(config)).total == parts.total - parts.gates
    assert config.routing == "causal"


def counted_flops(model: ThoughtbubblesForCausalLM, ids: Tensor, backward: bool = False, **arguments: Any) -> int:
    """What torch counts. It counts nothing for its fused CPU attention; the plain one has the same products."""
    with torch.set_grad_enabled(backward), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if backward:
            model(ids, labels=ids, return_logits=False).loss.backward()
        else:
            model(ids, **arguments)
    total: int = counter.get_total_flops()
    return total


def gate_flops(config: ThoughtbubblesConfig, length: int) -> int:
    """Of the gates, whose two scores are sums of products: torch counts products of matrices alone."""
    entering = [length, *layer_widths(config, length)]
    return sum(2 * entering[layer] * 2 * config.hidden_size for layer in config.gated_layers)


long = pytest.mark.long
FLOP_CASES = [
    *((routing, budget, "residual", 17) for routing, budget in SPENDING),
    *(pytest.param(routing, budget, "probability", 17, marks=long) for routing, budget in SPENDING),
    *(("causal", 1.5, merge, length) for merge in MERGES for length in (1, 9)),
    *(pytest.param("topk", 1.5, merge, length, marks=long) for merge in MERGES for length in (1, 9, 16)),
    ("none", 1, "probability", 9),
]


@pytest.mark.parametrize(("routing", "budget", "merge", "length"), FLOP_CASES)
def test_flops_are_what_torch_counts(routing: str, budget: float, merge: str, length: int) -> None:
    check_flops(length, routing=routing, budget=budget, merge=merge)


@pytest.mark.parametrize("block", [LLAMA, NEOX], ids=["llama", "neox"])
def test_flops_of_other_blocks_are_what_torch_counts(block: dict[str, Any]) -> None:
    check_flops(17, **block, budget=1.5)
    check_flops(17, **block, routing="none")


@pytest.mark.parametrize("fields", [{"budget": 1}, {"budget": 1.5}, {"routing": "topk", "budget": 3}, LLAMA], ids=str)
def test_flops_of_attended_forks_are_what_torch_counts(fields: dict[str, Any]) -> None:
    check_flops(17, **fields, fork_content="attended")
    shape = {**SHAPE, **fields}
    plain, attended = (ThoughtbubblesConfig(**shape, fork_content=content) for content in ("embedding", "attended"))
    assert forward_flops(plain, 17) < forward_flops(attended, 17)
    assert forward_flops(dense_twin(plain), 17) == forward_flops(dense_twin(attended), 17)


def check_flops(length: int, **fields: Any) -> None:
    config = ThoughtbubblesConfig(**SHAPE, attenuation="released", **fields)
    model, ids = ThoughtbubblesForCausalLM(config), torch.randint(61, (3, length))
    gates = gate_flops(config, length)
    assert counted_flops(model, ids) == 3 * (forward_flops(config, length) - gates)
    assert counted_flops(model, ids, backward=True) == 3 * (training_flops(config, length) - 3 * gates)


@pytest.mark.parametrize("budget", [1, 1.5, 4])
def test_flops_leave_out_the_channels_of_the_attenuation(budget: float) -> None:
    config = ThoughtbubblesConfig(**SHAPE, budget=budget, attenuation="paper")
    model, ids = ThoughtbubblesForCausalLM(config), torch.randint(61, (2, 17))
    each = attenuated_width(config.head_dim, 4, "cpu") - config.head_dim
    channels = each * sum(4 * config.num_attention_heads * width**2 for width in layer_widths(config, 17)[1:])
    assert counted_flops(model, ids) == 2 * (forward_flops(config, 17) + channels - gate_flops(config, 17))


def test_budget_of_a_call_goes_before_the_configured_one() -> None:
    config, other = ThoughtbubblesConfig(**SHAPE, budget=4), ThoughtbubblesConfig(**SHAPE, budget=1.5)
    assert forward_flops(config, 17, 1.5) == forward_flops(other, 17)
    assert decoding_flops(config, 17, 1.5) == decoding_flops(other, 17)
    assert cache_bytes(config, 17, 1.5) == cache_bytes(other, 17)
    assert activation_bytes(config, 17, 1.5) == activation_bytes(other, 17)


def test_dense_tokens_at_equal_flops() -> None:
    config = ThoughtbubblesConfig(**SHAPE, budget=2)
    dense = dense_twin(config)
    tokens = tokens_at_equal_flops(config, dense, 32, 10_000)
    assert 10_000 < tokens < 20_000
    spent = 10_000 * training_flops(config, 32)
    assert tokens * training_flops(dense, 32) <= spent < (tokens + 1) * training_flops(dense, 32)
    assert tokens_at_equal_flops(dense, dense, 32, 10_000) == 10_000


def test_the_dense_twin_of_a_looped_model_applies_its_blocks_once() -> None:
    looped = ThoughtbubblesConfig(**SHAPE, routing="none", num_loops=3)
    once = ThoughtbubblesConfig(**SHAPE, routing="none")
    assert dense_twin(looped).depth == 4
    assert training_flops(dense_twin(looped), 17) == training_flops(once, 17) < training_flops(looped, 17)
    assert looped.num_loops == 3


def decoding_model(**overrides: Any) -> ThoughtbubblesForCausalLM:
    model = ThoughtbubblesForCausalLM(ThoughtbubblesConfig(**{**SHAPE, "attenuation": "released", **overrides}))
    randomise(model)
    model.eval()
    return model


@pytest.mark.parametrize(
    ("routing", "budget", "fields"),
    [
        *((*rule, {"merge": merge}) for rule in (("none", 1), ("causal", 1), ("causal", 4)) for merge in MERGES[::2]),
        *(("causal", budget, {"fork_content": "attended"}) for budget in (1, 4)),
    ],
    ids=str,
)
def test_flops_of_a_cached_step_are_what_torch_counts(routing: str, budget: float, fields: dict[str, Any]) -> None:
    """Where every token has as many streams as every other, a step costs the mean."""
    model = decoding_model(routing=routing, budget=budget, **fields)
    cache, ids = StreamCache(), torch.randint(61, (1, 20))
    model(ids[:, :-1], cache=cache)
    counted = counted_flops(model, ids[:, -1:], cache=cache)
    assert counted == pytest.approx(decoding_flops(model.config, 20) - gate_flops(model.config, 20) / 20)


@pytest.mark.parametrize("budget", [2, pytest.param(1.5, marks=long), pytest.param(3, marks=long)])
def test_flops_of_the_cached_steps_of_a_row_are_near_the_sum(budget: float) -> None:
    """Above by no more than rounding of widths, below by what scores leave unspent of the budget."""
    model = decoding_model(budget=budget)
    cache, ids = StreamCache(), torch.randint(61, (1, 60), generator=torch.Generator().manual_seed(0))
    counted = sum(counted_flops(model, column, cache=cache) for column in ids.split(1, dim=1))
    expected = sum(
        decoding_flops(model.config, context) - gate_flops(model.config, context) / context for context in range(1, 61)
    )
    assert 0.9 * expected < counted < 1.02 * expected


def test_an_unknown_precision_is_refused() -> None:
    config = ThoughtbubblesConfig(**SHAPE)
    for compute in (state_bytes, lambda config, precision: cache_bytes(config, 8, precision=precision)):
        with pytest.raises(ValueError, match="precision='float16': expected one of float32, bfloat16"):
            compute(config, "float16")
    with pytest.raises(ValueError, match="precision='float16'"):
        activation_bytes(config, 8, precision="float16")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("attenuation", ["paper", "released", "none"])
@pytest.mark.parametrize("block", [LLAMA, NEOX], ids=["llama", "neox"])
def test_bytes_of_a_cache_of_other_blocks(block: dict[str, Any], attenuation: str, precision: str) -> None:
    check_bytes(precision, **block, budget=4, attenuation=attenuation)


def test_grouped_heads_shrink_a_cache() -> None:
    whole, shared = (ThoughtbubblesConfig(**SHAPE, routing="none", num_key_value_heads=heads) for heads in (2, 1))
    assert cache_bytes(whole, 100) == 4 * 100 * (2 * 2 * 16 * 4 + 8)
    assert cache_bytes(shared, 100) == 4 * 100 * (2 * 1 * 16 * 4 + 8)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("attenuation", ["paper", "released", "none"])
@pytest.mark.parametrize(("routing", "budget"), [("none", 1), ("causal", 1), ("causal", 4), ("threshold", 4)])
def test_bytes_of_a_cache(routing: str, budget: float, attenuation: str, precision: str) -> None:
    forks = check_bytes(precision, routing=routing, budget=budget, attenuation=attenuation).forks
    assert bool([buffer.data for memory in forks.values() for buffer in memory.buffers]) == (routing != "none")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("attenuation", ["paper", "released", "none"])
@pytest.mark.parametrize("routing", ["causal", "threshold"])
def test_bytes_of_a_cache_where_forks_attend(routing: str, attenuation: str, precision: str) -> None:
    """At the first fork layer scores are 0, at the second `paper` appends them to the key."""
    fields: dict[str, Any] = {"routing": routing, "budget": 4, "attenuation": attenuation}
    cache = check_bytes(precision, **fields, fork_content="attended")
    widths = {
        layer: memory.keys.data.shape[-1] for layer, memory in cache.attended.items() if memory.keys.data is not None
    }
    wider = {"float32": 1, "bfloat16": 2}[precision] if attenuation == "paper" else 0
    assert widths == {1: 64, 2: 64 + wider}
    assert {layer: memory.lengths for layer, memory in cache.attended.items()} == {1: [BLOCK] * 2, 2: [2 * BLOCK] * 2}


def check_bytes(precision: str, **fields: Any) -> StreamCache:
    """Where the budget is spent to the last stream and rows fill whole blocks of memory, exactly as many."""
    model = decoding_model(**fields).to(getattr(torch, precision))
    cache = StreamCache()
    model(torch.randint(61, (2, BLOCK)), cache=cache)
    assert cache.nbytes == 2 * cache_bytes(model.config, BLOCK, precision=precision, device="cpu")
    return cache


@pytest.mark.parametrize("budget", [1, 1.5, 2.5])
@pytest.mark.parametrize("length", [65, 129, 300])
def test_bytes_of_a_cache_but_for_the_growth(budget: float, length: int) -> None:
    model = decoding_model(budget=budget, attenuation="paper", max_position_embeddings=300)
    cache = StreamCache()
    model(torch.randint(61, (1, length)), cache=cache)
    expected = cache_bytes(model.config, length, device="cpu")
    # A step of growth for every buffer: keys, values and ordinals of each layer, 13 bytes at each fork layer.
    growth = sum(BLOCK * (2 * 34 * 4 + 8) for _ in range(4)) + 2 * BLOCK * 13
    assert 0.9 * expected < cache.nbytes < expected + growth


def test_bytes_of_a_cache_on_a_gpu_have_padded_heads() -> None:
    config = ThoughtbubblesConfig(**SHAPE, budget=1)
    keys = 2 * 2 * 4 * 10 * sum((16, 24, 24, 24))  # two heads of 16, from the first fork on 16 + 1 up to 24
    assert cache_bytes(config, 10, device="cuda") == keys + 10 * 8 * 4 + 2 * 10 * 13


def test_bytes_of_training_state() -> None:
    config = ThoughtbubblesConfig(**SHAPE, tie_word_embeddings=False)
    model = ThoughtbubblesForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randint(61, (1, 8)), labels=torch.randint(61, (1, 8))).loss.backward()
    optimizer.step()
    state = state_bytes(config)
    assert state.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert state.gradients == sum(each.grad.nbytes for each in model.parameters() if each.grad is not None)
    moments = [value for kept in optimizer.state.values() for value in kept.values() if value.dim()]
    assert state.optimizer == sum(moment.nbytes for moment in moments)
    assert state.total == state.weights + state.gradients + state.optimizer + state.loss


class Held:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_casts_of_attended_forks_are_kept() -> None:
    config = ThoughtbubblesConfig(**SHAPE, fork_content="attended")
    plain = ThoughtbubblesConfig(**SHAPE)
    kept = 2 * 4 * 64 * 32 * 2  # two gates, q, k, v and output
    assert state_bytes(config, "float32").casts == 0
    for checkpointing in (False, True):
        casts = [state_bytes(each, "bfloat16", checkpointing).casts for each in (config, plain)]
        assert casts[0] - casts[1] == kept
    assert process_bytes(config, "bfloat16", processes=4, sharding="fsdp").casts == kept
    assert process_bytes(plain, "bfloat16", processes=4, sharding="fsdp").casts == 0


def saved_bytes(config: ThoughtbubblesConfig, rows: int, length: int, precision: str, checkpointing: bool) -> int:
    """Bytes of the distinct storages that autograd keeps after a forward, parameters left out."""
    torch.manual_seed(0)
    model = ThoughtbubblesForCausalLM(config)
    model.train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor.detach())  # an output that held its own graph would outlive it
        kept.add(held)
        return held

    ids = torch.randint(config.vocab_size, (rows, length))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        loss = model(ids, labels=ids, return_logits=False).loss
    storages = [held.tensor.untyped_storage() for held in kept]
    assert loss.requires_grad
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in own}.values())


@dataclass(frozen=True)
class Case:
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int | None
    length: int
    rows: int


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields",
    [
        {"routing": "none", "budget": 1},
        {"routing": "copy", "budget": 2},
        {"budget": 1},
        {"budget": 2},
        {"routing": "topk", "budget": 1.5, "attenuation": "released"},
        {"budget": 4, "attenuation": "none", "merge": "root"},
        {"budget": 3, "merge": "residual-normed"},
        {"budget": 4, "merge": "probability"},
        {"budget": 1.5, "gate_scores": "fixed"},
        {"budget": 1.5, "gate_scores": "forks", "fork_embedding": "relative"},
        {"budget": 1.5, "gate_scores": "forks", "gate_start": 0.02},
        {"budget": 2, "fork_content": "attended"},
        {"budget": 1.5, "fork_content": "attended", "attenuation": "released", "routing": "topk"},
        {"budget": 1.5, "fork_content": "attended", "attenuation": "none", "merge": "root"},
        {"budget": 3, "fork_content": "attended", "gate_scores": "fixed", "fork_embedding": "relative"},
        {**LLAMA, "budget": 2, "fork_content": "attended", "merge": "probability"},
        {**LLAMA, "routing": "none", "budget": 1},
        {**LLAMA, "budget": 2},
        {**LLAMA, "budget": 1.5, "gate_scores": "fixed", "merge": "residual-normed"},
        {**LLAMA, "qk_norm": False, "budget": 2, "merge": "probability"},
        {**NEOX, "budget": 2},
        {**NEOX, "budget": 2, "qk_norm": True, "attenuation": "released", "routing": "topk"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "case",
    [
        Case(61, 64, 2, None, 33, 3),
        Case(997, 96, 4, 200, 64, 2),
        pytest.param(Case(300, 128, 8, 512, 99, 1), marks=long),
    ],
    ids=lambda case: f"D{case.hidden_size}",
)
def test_activations_are_what_autograd_saves(
    case: Case, fields: dict[str, Any], precision: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last byte in float32; in bfloat16 but for the casts of scores and norms."""
    monkeypatch.setattr("thoughtbubbles.model.attention.suits", lambda q: False)  # the fused kernels that are counted
    config = ThoughtbubblesConfig(
        vocab_size=case.vocab_size,
        hidden_size=case.hidden_size,
        num_hidden_layers=4,
        num_attention_heads=case.num_attention_heads,
        intermediate_size=case.intermediate_size,
        fork_layers=[1, 2],
        **fields,
    )
    found = saved_bytes(config, case.rows, case.length, precision, checkpointing)
    each = activation_bytes(
        config, case.length, precision=precision, gradient_checkpointing=checkpointing, device="cpu"
    )
    expected = case.rows * each.saved + state_bytes(config, precision, checkpointing).casts
    expected += case.vocab_size * case.hidden_size * 4
    assert expected == found if precision == "float32" else 0.99 * found < expected < 1.001 * found


def test_checkpointing_trades_activations_for_a_block() -> None:
    config = ThoughtbubblesConfig.preset("150m")
    kept, recomputed = (activation_bytes(config, 1024, gradient_checkpointing=flag) for flag in (False, True))
    assert recomputed.blocks < kept.blocks / 8
    assert recomputed.loss == kept.loss == 1024 * 768 * 4
    small = ThoughtbubblesConfig(**{**SHAPE, "vocab_size": 8})
    passing = [activation_bytes(small, 64, gradient_checkpointing=flag).passing for flag in (False, True)]
    assert passing[0] < passing[1] < activation_bytes(small, 64).blocks


def test_a_block_is_computed_again_when_the_loss_has_passed() -> None:
    """A dense model's blocks are alike: what one more saves, less the loss, is held beside the rest."""
    one, two = (ThoughtbubblesConfig(**{**SHAPE, "num_hidden_layers": n}, routing="none") for n in (4, 5))
    block = activation_bytes(two, 64).blocks - activation_bytes(one, 64).blocks
    again = activation_bytes(one, 64, gradient_checkpointing=True)
    assert again.passing == block - again.loss > 0


@pytest.mark.parametrize(
    "rules", [{"budget": 3.25}, {"routing": "random", "random_rule": "topk", "budget": 3.25}], ids=str
)
def test_layer_widths_are_those_of_the_streams(rules: dict[str, Any]) -> None:
    config = ThoughtbubblesConfig(**SHAPE, **rules)
    out = ThoughtbubblesForCausalLM(config)(torch.randint(61, (1, 11)), output_streams=True)
    assert layer_widths(config, 11) == [streams.token.shape[1] for streams in out.streams[:-1]]
    assert layer_widths(config, 11, 1) == [11, 11, 11, 11]


def test_layer_widths_of_copies() -> None:
    config = ThoughtbubblesConfig(**SHAPE, routing="copy", copy_layer=2, budget=3)
    assert layer_widths(config, 11) == [11, 11, 33, 33]
    assert layer_widths(config, 11, 4) == [11, 11, 44, 44]
    assert layer_widths(ThoughtbubblesConfig(**SHAPE, routing="pause", budget=3), 11) == [33] * 4
    with pytest.raises(ValueError, match=r"budget=1\.5: expected a whole number"):
        layer_widths(config, 11, 1.5)
