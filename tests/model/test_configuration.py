"""The configuration and its presets."""

import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import LLAMA3, ROPES
from thoughtbubbles.model.configuration import PRESETS, ThoughtbubblesConfig, default_fork_layers
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM

LAYERS = "distinct 0-based layers in ascending order, each below num_hidden_layers=16"
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "num_loops",
    "num_key_value_heads",
    "head_dim",
)
WRONG: list[tuple[tuple[str, ...], list[Any], str]] = [
    (SIZES, [0, -1, 2.0, True, "8"], "a whole number of at least 1"),
    (("hidden_size",), [760, 780], "a multiple of 2 * num_attention_heads = 24"),
    (("hidden_act",), ["gelu2", None, 1, []], "one of gelu"),
    (("use_bias", "tie_word_embeddings", "qk_norm", "parallel_residual"), ["yes", None, 2], "True or False"),
    (("attention_bias", "attention_output_bias", "mlp_bias", "use_cache"), ["yes", 1], "True, False or None"),
    (("num_key_value_heads",), [5, 24], "a divisor of num_attention_heads = 12"),
    (("partial_rotary_factor",), [0, 1.5, -0.5, "1", True, math.nan], "a share above 0 and at most 1"),
    (("norm",), ["RMSNorm", None], "one of layernorm, rmsnorm"),
    (("mlp",), ["swiglu", None], "one of plain, gated"),
    (("layer_norm_eps", "rope_theta"), [0, -1.0, "1", True, None, math.nan, math.inf], "a number above 0"),
    (("initializer_range",), [-0.1, "1", True, math.nan, math.inf], "a number of at least 0"),
    (("hidden_dropout",), [1.0, -0.1, "0", True, math.nan], "a probability in [0, 1)"),
    (("fork_layers",), [[16], [-1], [3, 3], [7, 3], 3, "3", [1.0], [True], [None]], LAYERS),
    (("budget",), [0.5, "abc", True, math.nan, math.inf, 2000, None], "a number of streams per token from 1 to 1024"),
    (("routing",), ["top-k", None, ["causal"]], "one of causal, threshold, topk, none, copy, pause, random, uniform"),
    (("random_rule",), ["uniform", None], "one of causal, topk"),
    (("routing_seed",), [-1, 2**32, 1.0, True, None], "a whole number from 0 to 2^32 - 1"),
    (("copy_layer",), [-1, 16, 1.0, True, None], "a 0-based layer below num_hidden_layers=16"),
    (("gate_scores",), ["roots", None, ["forks"]], "one of learned, forks, fixed"),
    (("gate_start",), [0, 1, -0.1, 2, "0.02", True, math.nan], "None or a score above 0 and below 1"),
    (("dense_config",), ["llama", {}, {"vocab_size": 3}], "None, or a configuration with its model_type"),
    (("fork_embedding",), ["large", None, 0.5], "one of absolute, relative"),
    (("fork_embedding_init",), ["zeros", None, 0.5], "one of uniform, normal"),
    (("fork_content",), ["attention", None, True], "one of embedding, attended"),
    (("attenuation",), ["p", None, ["paper"]], "one of paper, released, none"),
    (("bos_token_id", "pad_token_id"), [50257, -2, True, "0", 1.0, [0]], "from 0 to 50256 (vocab_size - 1)"),
    (("eos_token_id",), [50257, -1, True, "0", [0, 50257], [None]], "from 0 to 50256 (vocab_size - 1)"),
    (("merge",), ["sum", None, ["root"]], "one of residual, residual-normed, probability, root"),
]
CASES = [
    pytest.param(field, value, allowed, id=f"{field}-{value!r}")
    for fields, values, allowed in WRONG
    for field in fields
    for value in values
]


@pytest.mark.parametrize(("field", "value", "allowed"), CASES)
def test_wrong_value_names_field_value_and_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}: expected")) as error:
        ThoughtbubblesConfig(**{field: value})
    assert allowed in str(error.value)


@pytest.mark.parametrize("budget", [1, 1.2, 4 / 3, "4/3", Fraction(4, 3)], ids=str)
def test_json_round_trip(tmp_path: Path, budget: Any) -> None:
    config = ThoughtbubblesConfig(
        vocab_size=23,
        hidden_size=24,
        num_hidden_layers=5,
        num_attention_heads=3,
        intermediate_size=40,
        hidden_act="silu",
        use_bias=False,
        layer_norm_eps=1e-6,
        hidden_dropout=0.1,
        rope_theta=500.0,
        max_position_embeddings=77,
        initializer_range=0.03,
        fork_layers=[0, 4],
        budget=budget,
        routing="topk",
        random_rule="topk",
        routing_seed=7,
        copy_layer=2,
        gate_scores="forks",
        gate_start=0.02,
        dense_config={"model_type": "llama", "rope_parameters": {"rope_theta": 1e4}},
        fork_embedding="relative",
        fork_embedding_init="normal",
        fork_content="attended",
        attenuation="released",
        merge="root",
        tie_word_embeddings=False,
        pad_token_id=1,
        num_key_value_heads=1,
        head_dim=10,
        mlp="gated",
        norm="rmsnorm",
        attention_bias=True,
        attention_output_bias=False,
        mlp_bias=True,
        qk_norm=True,
        parallel_residual=True,
        partial_rotary_factor=0.5,
    )
    config.save_pretrained(tmp_path)
    again = ThoughtbubblesConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.exact_budget() == config.exact_budget()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "thoughtbubbles"


def test_budget_of_a_call_overrides_the_configured_one() -> None:
    config = ThoughtbubblesConfig(budget=1.2)
    assert config.exact_budget() == Fraction(6, 5)
    assert config.exact_budget("7/2") == Fraction(7, 2)


def test_intermediate_size_defaults_to_four_times_the_width() -> None:
    assert ThoughtbubblesConfig(hidden_size=48).intermediate_size == 192


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, [0]), (2, [0]), (3, [0, 1]), (4, [0, 1, 2]), (8, [1, 3, 5]), (16, [3, 7, 11]), (36, [8, 17, 26])],
)
def test_default_fork_layers(layers: int, expected: list[int]) -> None:
    assert default_fork_layers(layers) == expected
    assert ThoughtbubblesConfig(num_hidden_layers=layers).fork_layers == expected


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 6, 7, 11])
def test_default_fork_layers_are_valid_at_any_depth(layers: int) -> None:
    fork_layers = ThoughtbubblesConfig(num_hidden_layers=layers).fork_layers
    assert fork_layers
    assert max(fork_layers) < layers


def test_routing_none_has_no_gates() -> None:
    for routing in ("none", "copy", "pause"):
        assert ThoughtbubblesConfig(routing=routing).gated_layers == ()
    assert ThoughtbubblesConfig(fork_layers=[2, 5]).gated_layers == (2, 5)


@pytest.mark.parametrize("special", [{}, {"bos_token_id": 22, "eos_token_id": 0}, {"eos_token_id": [0, 22]}], ids=str)
def test_special_tokens_of_the_vocabulary_are_kept(tmp_path: Path, special: dict[str, Any]) -> None:
    ThoughtbubblesConfig(vocab_size=23, pad_token_id=7, **special).save_pretrained(tmp_path)
    config = ThoughtbubblesConfig.from_pretrained(tmp_path)
    assert config.pad_token_id == 7
    assert {name: getattr(config, name) for name in special} == special


def test_vocabulary_too_small_for_its_special_tokens() -> None:
    with pytest.raises(ValueError, match=r"eos_token_id=50256: expected None or a token id from 0 to 1999"):
        ThoughtbubblesConfig(vocab_size=2000, eos_token_id=50256)


def test_padding_with_token_minus_one_is_none() -> None:
    assert ThoughtbubblesConfig(pad_token_id=-1).pad_token_id is None


@pytest.mark.parametrize("routing", ["causal", "copy", "random"])
def test_loops_are_for_the_dense_model(routing: str) -> None:
    with pytest.raises(ValueError, match=f"num_loops=2: expected 1, since routing is {routing}"):
        ThoughtbubblesConfig(routing=routing, num_loops=2)
    assert ThoughtbubblesConfig(routing="none", num_loops=2).depth == 32


def test_no_fork_layers_is_allowed() -> None:
    assert ThoughtbubblesConfig(fork_layers=[]).gated_layers == ()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_docstring_states_the_exact_parameter_count(name: str) -> None:
    stated = re.search(r"([\d,]+) parameters", PRESETS[name].__doc__ or "")
    assert stated is not None
    with torch.device("meta"):
        model = ThoughtbubblesForCausalLM(ThoughtbubblesConfig.preset(name))
    assert sum(p.numel() for p in model.parameters()) == int(stated[1].replace(",", ""))


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "forks"),
    [
        ("150m", 16, 768, 12, [3, 7, 11]),
        ("319m", 21, 1024, 16, [3, 7, 11]),
        ("530m", 38, 1024, 16, [3, 7, 11]),
        ("772m", 36, 1280, 20, [3, 7, 11]),
        ("1.9b", 36, 2048, 16, [2, 5, 8]),
    ],
)
def test_preset_has_the_shape_of_design_5_1(name: str, layers: int, width: int, heads: int, forks: list[int]) -> None:
    config = ThoughtbubblesConfig.preset(name)
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.fork_layers)
    assert shape == (layers, width, heads, forks)
    assert config.intermediate_size == 4 * width
    assert config.tie_word_embeddings
    assert config.hidden_act == "gelu"


def test_preset_takes_overrides() -> None:
    config = ThoughtbubblesConfig.preset("150m", routing="topk", budget=4.0)
    assert (config.routing, config.budget, config.hidden_size) == ("topk", 4.0, 768)


def test_unknown_preset_names_the_presets() -> None:
    with pytest.raises(ValueError, match=r"preset='150M': expected one of nano, .*150m"):
        ThoughtbubblesConfig.preset("150M")


@pytest.mark.parametrize("routing", ["copy", "pause"])
def test_budget_of_copies_is_whole(routing: str) -> None:
    for budget in (1.5, "4/3"):
        with pytest.raises(ValueError, match=f"budget={budget!r}: expected a whole number of streams per token, since"):
            ThoughtbubblesConfig(routing=routing, budget=budget)
    assert ThoughtbubblesConfig(routing=routing, budget="3.0").exact_budget() == 3
    with pytest.raises(ValueError, match="since routing is"):
        ThoughtbubblesConfig(routing=routing).exact_budget(2.5)


def test_pause_has_vectors_for_the_configured_budget() -> None:
    config = ThoughtbubblesConfig(routing="pause", budget=3)
    assert config.exact_budget(2) == 2
    with pytest.raises(ValueError, match="budget=4: expected at most 3, for which there are pause vectors"):
        config.exact_budget(4)


def test_layers_and_rules_of_the_controls() -> None:
    for routing in ("causal", "threshold", "topk", "random", "uniform"):
        config = ThoughtbubblesConfig(routing=routing, fork_layers=[3, 7])
        assert (config.gated_layers, config.copied_layers) == ((3, 7), ())
        assert (config.rule.leaks, config.rule.learned) == (routing == "topk", routing not in ("random", "uniform"))
    assert ThoughtbubblesConfig(routing="random", random_rule="topk").leaks
    assert not ThoughtbubblesConfig(routing="topk", fork_layers=[]).leaks
    assert ThoughtbubblesConfig(routing="copy", copy_layer=4).copied_layers == (4,)
    assert ThoughtbubblesConfig(routing="pause", copy_layer=4).copied_layers == (0,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"routing": "pause", "budget": 1.5}, "budget=1.5: expected a whole number"),
        ({"num_hidden_layers": 2}, r"fork_layers=\[3, 7, 11\]: expected distinct"),
    ],
)
def test_fields_changed_in_loading_are_checked(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    ThoughtbubblesConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        ThoughtbubblesConfig.from_pretrained(tmp_path, **fields)
    loaded, unused = ThoughtbubblesConfig.from_pretrained(tmp_path, budget=3, more=1, return_unused_kwargs=True)
    assert (loaded.budget, unused) == (3, {"more": 1})


def test_rotary_parameters_of_transformers_become_fields() -> None:
    config = ThoughtbubblesConfig(
        rope_parameters={**LLAMA3, "type": "linear", "rope_theta": 5e5, "partial_rotary_factor": 0.5, "beta_fast": None}
    )
    own = {"rope_theta": 5e5, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 1024}
    assert config.rope_parameters == {**LLAMA3, **own}
    assert (config.rope_theta, config.partial_rotary_factor) == (5e5, 0.5)
    plain = ThoughtbubblesConfig(rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    assert (plain.rope_parameters, plain.rope_theta) == (None, 100.0)


@pytest.mark.parametrize("parameters", ROPES, ids=lambda rope: rope["rope_type"])
def test_rotary_parameters_survive_a_round_trip_and_an_override(tmp_path: Path, parameters: dict[str, Any]) -> None:
    ThoughtbubblesConfig(rope_parameters={**parameters, "rope_theta": 5e5}).save_pretrained(tmp_path)
    whole = {**parameters, "partial_rotary_factor": 1.0}
    again = ThoughtbubblesConfig.from_pretrained(tmp_path)
    assert (again.rope_theta, again.rope_parameters) == (5e5, {**whole, "rope_theta": 5e5})
    other = ThoughtbubblesConfig.from_pretrained(tmp_path, rope_theta=70.0)
    assert (other.rope_theta, other.rope_parameters) == (70.0, {**whole, "rope_theta": 70.0})


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "another rope_type than 'dynamic', whose frequencies depend on the"),
        ({"type": "longrope"}, "another rope_type than 'longrope', whose frequencies depend on the longest row"),
        ({"rope_type": "su"}, "rope_type to be one of default, linear, llama3, yarn"),
        ({"rope_type": ["yarn"]}, "rope_type to be one of default, linear, llama3, yarn"),
        ({"rope_type": "linear"}, "factor too, for rope_type 'linear'"),
        ({"rope_type": "linear", "factor": 0.5}, "factor to be a number of at least 1"),
        ({"rope_type": "linear", "factor": True}, "factor to be a number of at least 1"),
        ({"rope_type": "default", "factor": 2.0}, "no 'factor' for rope_type 'default'"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate to be True or False"),
        ({"rope_type": "yarn", "factor": 2.0, "mrope_section": [1]}, "no 'mrope_section' for rope_type 'yarn'"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "low_freq_factor below high_freq_factor"),
        (
            {**LLAMA3, "original_max_position_embeddings": 8.5},
            "original_max_position_embeddings to be a whole number of at least 1",
        ),
        ({"rope_theta": -1}, "rope_theta to be a number above 0"),
        (3, "a mapping such as"),
    ],
    ids=str,
)
def test_wrong_rotary_parameters(parameters: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"rope_parameters={parameters!r}: expected {expected}")):
        ThoughtbubblesConfig(rope_parameters=parameters)


def test_older_names_of_rotary_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rope_scaling=.*: expected rope_parameters, its name since transformers 5"):
        ThoughtbubblesConfig(**{"rope_scaling": {"type": "linear", "factor": 2.0}})


def test_shape_of_the_heads() -> None:
    config = ThoughtbubblesConfig(hidden_size=48, num_attention_heads=6)
    assert (config.head_dim, config.num_key_value_heads) == (8, 6)
    free = ThoughtbubblesConfig(hidden_size=50, num_attention_heads=6, num_key_value_heads=2, head_dim=20)
    assert (free.head_dim, free.num_key_value_heads) == (20, 2)
    odd = ThoughtbubblesConfig(hidden_size=50, num_attention_heads=6, head_dim=9, partial_rotary_factor=0.5)
    assert odd.head_dim == 9
    with pytest.raises(ValueError, match="head_dim=9: expected an even number, since all its channels turn, in pairs"):
        ThoughtbubblesConfig(head_dim=9)
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.1: expected a share of at least 1 / 8"):
        ThoughtbubblesConfig(head_dim=8, partial_rotary_factor=0.1)


def test_biases_are_those_of_all_but_where_a_part_has_its_own() -> None:
    parts = ("attention", "attention_output", "mlp")
    for use in (True, False):
        assert [ThoughtbubblesConfig(use_bias=use).has_bias(part) for part in parts] == [use] * 3
        for part in parts:
            other = ThoughtbubblesConfig(use_bias=use, **{f"{part}_bias": not use})
            assert [other.has_bias(each) for each in parts] == [use != (each == part) for each in parts]


def test_yarn_turns_an_even_number_of_channels() -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    with pytest.raises(
        ValueError, match=r"partial_rotary_factor=0\.5: expected a share of head_dim=10 that is an even"
    ):
        ThoughtbubblesConfig(head_dim=10, partial_rotary_factor=0.5, rope_parameters=rope)
