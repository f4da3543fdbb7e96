"""Checkpoints of the authors' release, and our numbers against theirs."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import SHARED, relative_errors
from thoughtbubbles import convert_released_state_dict
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM

GOLDEN = SHARED / "golden"
NAMES = ["released-dense", "released-k2-residual", "released-k3-rightmost", "released-k4-residual"]
golden = [
    pytest.mark.data,
    pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden files of the release are not at {GOLDEN}"),
]


def released_state_dict(layers: int = 2, gated: tuple[int, ...] = (1,), bias: bool = True) -> dict[str, Tensor]:
    """A state dict with the release's names and shapes: D = 8, V = 11."""
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (11, 8), "lm_head.weight": (11, 8)}
    for layer in range(layers):
        head = f"transformer.h.{layer}"
        norms = ["ln_1", "ln_2", *(["forking_ln"] if layer in gated else [])]
        linears = {"attn.c_attn": (24, 8), "attn.c_proj": (8, 8), "mlp.c_fc": (32, 8), "mlp.c_proj": (8, 32)}
        shapes |= {f"{head}.{name}.weight": (8,) for name in norms}
        shapes |= {f"{head}.{name}.weight": shape for name, shape in linears.items()}
        if bias:
            shapes |= {f"{head}.{name}.bias": (8,) for name in norms}
            shapes |= {f"{head}.{name}.bias": shape[:1] for name, shape in linears.items()}
        if layer in gated:
            shapes |= {f"{head}.forking_score.weight": (2, 8), f"{head}.fork_embedding": (8,)}
    shapes |= {"transformer.ln_f.weight": (8,)} | ({"transformer.ln_f.bias": (8,)} if bias else {})
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("gated", [(), (1,), (0, 2)], ids=str)
def test_converted_weights_fit_the_converted_configuration(gated: tuple[int, ...], bias: bool) -> None:
    config, weights = convert_released_state_dict(released_state_dict(3, gated, bias), num_attention_heads=2, budget=3)
    ThoughtbubblesForCausalLM(config).load_state_dict(weights, strict=True)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (11, 8, 3)
    assert (config.intermediate_size, config.num_attention_heads, config.use_bias) == (32, 2, bias)
    assert (config.fork_layers, config.budget) == (list(gated), 3)
    assert (config.routing, config.attenuation) == ("topk" if gated else "none", "released")
    assert config.merge == "residual-normed"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_compile_and_ddp_are_dropped(prefix: str) -> None:
    plain = released_state_dict()
    _, expected = convert_released_state_dict(plain, 2)
    _, weights = convert_released_state_dict({prefix + name: value for name, value in plain.items()}, 2)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_tied_embedding_may_be_stored_once() -> None:
    state_dict = released_state_dict()
    del state_dict["lm_head.weight"]
    _, weights = convert_released_state_dict(state_dict, 2)
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]


def test_overrides_reach_the_configuration() -> None:
    config, _ = convert_released_state_dict(released_state_dict(), 2, merge="root", max_position_embeddings=64)
    assert (config.merge, config.max_position_embeddings) == ("root", 64)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wpe.weight",
        "transformer.h.0.attn.bias_k",
        "transformer.h.x.ln_1.weight",
        "transformer.h.0.ln_3.weight",
        "model.embed_tokens.weight",
        "lm_head.bias",
    ],
)
def test_unknown_name_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*not a name of the authors' release"):
        convert_released_state_dict({**released_state_dict(), name: torch.zeros(8)}, 2)


def test_missing_embedding_is_a_value_error() -> None:
    state_dict = released_state_dict()
    del state_dict["transformer.wte.weight"]
    with pytest.raises(ValueError, match=r"without transformer\.wte\.weight"):
        convert_released_state_dict(state_dict, 2)


# --- Golden files ---


def load(name: str) -> tuple[ThoughtbubblesForCausalLM, dict[str, Any], dict[str, Tensor]]:
    """Our model with the released weights, the metadata and every array of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    meta: dict[str, Any] = json.loads(bytes(arrays.pop("meta").tolist()))
    overrides = {"merge": "root"} if meta["averaging"] == "rightmost" else {}
    config, weights = convert_released_state_dict(
        part(arrays, "param:"), meta["num_attention_heads"], meta["budget"], **overrides
    )
    model = ThoughtbubblesForCausalLM(config).eval()
    model.load_state_dict(weights)
    return model, meta, arrays


def part(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


class TestGolden:
    pytestmark = [*golden, pytest.mark.parametrize("name", NAMES)]

    def test_logits_and_loss(self, name: str) -> None:
        model, meta, arrays = load(name)
        logits = model(arrays["input_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), arrays["labels"].flatten(), ignore_index=-1)
        assert torch.allclose(logits, arrays["logits"], rtol=0, atol=1e-5)
        assert loss.item() == pytest.approx(meta["loss"], abs=1e-5)

    def test_gradients(self, name: str) -> None:
        model, _, arrays = load(name)
        logits = model(arrays["input_ids"]).logits
        F.cross_entropy(logits.flatten(0, 1), arrays["labels"].flatten(), ignore_index=-1).backward()
        _, expected = convert_released_state_dict(part(arrays, "grad:"), 1)
        gradients = {parameter: p.grad for parameter, p in model.named_parameters()}
        errors = relative_errors(gradients, {parameter: expected[parameter] for parameter in gradients})
        assert max(errors.values()) < 1e-4, errors

    def test_scores_and_tokens_after_every_fork_layer(self, name: str) -> None:
        model, meta, arrays = load(name)
        streams = model(arrays["input_ids"], output_streams=True).streams
        assert list(model.config.gated_layers) == meta["fork_layers"]
        for layer in meta["fork_layers"]:
            assert torch.equal(streams[layer].token, arrays[f"token_index:{layer}"].long())
            assert torch.allclose(streams[layer].log_score, arrays[f"scores:{layer}"], rtol=0, atol=1e-5)

    def test_converted_weights_are_the_released_ones(self, name: str) -> None:
        model, _, arrays = load(name)
        theirs = part(arrays, "param:")
        theirs.pop("lm_head.weight", None)
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.values())
