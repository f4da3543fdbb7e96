"""Blocks applied several times with the same weights, beside a deeper model whose weights are copies."""

from typing import Any

import pytest
import torch

from tests.helpers import padding_mask, random_ids, random_model, relative_errors, tiny_config
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.model.accounting import (
    activation_bytes,
    cache_bytes,
    count_parameters,
    decoding_flops,
    dense_twin,
    forward_flops,
    layer_widths,
    state_bytes,
)
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.memory import BLOCK
from thoughtbubbles.model.reference import reference_forward

LAYERS = 3
DENSE: dict[str, Any] = {"routing": "none", "num_hidden_layers": LAYERS, "fork_layers": []}
LOOPED = tiny_config(**DENSE, num_loops=2)


@pytest.fixture
def looped() -> ThoughtbubblesForCausalLM:
    return random_model(LOOPED).double()


def copied(looped: ThoughtbubblesForCausalLM) -> ThoughtbubblesForCausalLM:
    """A model of as many layers as a token of the looped one passes, each with the weights of its loop's."""
    loops = looped.config.num_loops
    deep = random_model(tiny_config(**{**DENSE, "num_hidden_layers": loops * LAYERS})).double()
    weights = looped.state_dict()
    for name in deep.state_dict():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(int(parts[2]) % LAYERS)
        deep.state_dict()[name].copy_(weights[".".join(parts)])
    return deep


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("loops", [2, 3])
def test_a_looped_model_is_a_deeper_one_bit_for_bit(loops: int, padding: str) -> None:
    looped = random_model(tiny_config(**DENSE, num_loops=loops)).double()
    deep, ids = copied(looped), random_ids(3, 11)
    mask = padding_mask(padding, 3, 11)
    ours, theirs = (model(ids, attention_mask=mask, labels=ids, output_hidden_states=True) for model in (looped, deep))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    assert len(ours.hidden_states) == loops * LAYERS + 1
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))


@pytest.mark.parametrize("steps", [[5, 1, 1, 4], [1] * 11], ids=str)
def test_cached_too(looped: ThoughtbubblesForCausalLM, steps: list[int]) -> None:
    deep, ids = copied(looped), random_ids(2, 11)
    caches = [StreamCache(), StreamCache()]
    found = []
    for part in ids.split(steps, dim=1):
        ours, theirs = (model(part, cache=cache).logits for model, cache in zip((looped, deep), caches, strict=True))
        assert torch.equal(ours, theirs)
        found.append(ours)
    assert len(caches[0]) == 2 * LAYERS
    torch.testing.assert_close(torch.cat(found, dim=1), looped(ids).logits, rtol=1e-10, atol=1e-10)
    generated = [model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0) for model in (looped, deep)]
    assert torch.equal(*generated)


def test_gradients_are_those_of_the_reference(looped: ThoughtbubblesForCausalLM) -> None:
    ids, mask = random_ids(2, 7), padding_mask("holes", 2, 7)
    parameters = {name: each.detach().clone().requires_grad_() for name, each in looped.named_parameters()}
    expected = reference_forward(LOOPED, parameters, ids, mask, ids)
    found = looped(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], rtol=1e-9, atol=1e-9)
    found.loss.double().backward()
    expected.loss.backward()
    errors = relative_errors(
        {name: each.grad for name, each in looped.named_parameters()},
        {name: each.grad for name, each in parameters.items()},
        1e-9,
    )
    assert max(errors.values()) < 1e-9, errors
    assert len(expected.states[0]) == 2 * LAYERS + 1


def test_checkpointing_computes_the_same(looped: ThoughtbubblesForCausalLM) -> None:
    ids = random_ids(2, 7)
    gradients = []
    for checkpointing in (False, True):
        looped.train()
        if checkpointing:
            getattr(looped, "activation_checkpointing_enable", looped.gradient_checkpointing_enable)()
        gradients.append(torch.autograd.grad(looped(ids, labels=ids).loss, list(looped.parameters())))
    assert all(map(torch.equal, *gradients))


def test_a_cache_serves_one_number_of_loops(looped: ThoughtbubblesForCausalLM) -> None:
    once = random_model(tiny_config(**DENSE)).double()
    cache, ids = StreamCache(), random_ids(1, 4)
    once(ids, cache=cache)
    with pytest.raises(ValueError, match=r"cache: filled by a model with .*num_loops.: 1.*, expected .*num_loops.: 2"):
        looped(ids, cache=cache)


def test_what_it_costs() -> None:
    """The weights of a model of as many layers, the computation and memory of one of twice as many."""
    once, deep = tiny_config(**DENSE), tiny_config(**{**DENSE, "num_hidden_layers": 2 * LAYERS})
    assert count_parameters(LOOPED) == count_parameters(once) == count_parameters(dense_twin(LOOPED))
    assert state_bytes(LOOPED, "bfloat16") == state_bytes(once, "bfloat16")
    assert layer_widths(LOOPED, 9) == layer_widths(deep, 9) == [9] * 2 * LAYERS
    for cost in (forward_flops, decoding_flops, cache_bytes, activation_bytes):
        assert cost(LOOPED, 9) == cost(deep, 9)
    assert dense_twin(LOOPED).depth == LAYERS
    cache = StreamCache()
    random_model(LOOPED)(random_ids(2, BLOCK), cache=cache)
    assert cache.nbytes == 2 * cache_bytes(LOOPED, BLOCK, device="cpu")
