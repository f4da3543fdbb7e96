from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.accounting import count_parameters, forward_flops, layer_widths
from thoughtbubbles.configuration import PRESETS, ROUTINGS

SHAPE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "fork_layers": [1, 2]}
GATED = ("causal", "topk", "random", "uniform")
SPENDING = [
    *((routing, budget) for routing in (*GATED, "none") for budget in (1, 1.2, 2, 4)),
    *((routing, budget) for routing in ("copy", "pause") for budget in (1, 2, 3)),
]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("overrides", [{}, {"use_bias": False}, {"tie_word_embeddings": False}], ids=str)
def test_parameters_are_those_of_the_model(routing: str, overrides: dict[str, bool]) -> None:
    config = ThoughtbubblesConfig(**SHAPE, routing=routing, **overrides)
    model = ThoughtbubblesForCausalLM(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets(name: str) -> None:
    config = ThoughtbubblesConfig.preset(name)
    with torch.device("meta"):
        model = ThoughtbubblesForCausalLM(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("routing", "budget"), SPENDING)
@pytest.mark.parametrize("merge", ["residual", "probability"])
def test_forward_flops_are_what_torch_counts(routing: str, budget: float, merge: str) -> None:
    config = ThoughtbubblesConfig(**SHAPE, routing=routing, budget=budget, merge=merge, attenuation="released")
    model = ThoughtbubblesForCausalLM(config)
    # torch counts no flops for its fused CPU attention; the plain one has the same products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(61, (3, 17)))
    assert counter.get_total_flops() == 3 * forward_flops(config, 17)


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
