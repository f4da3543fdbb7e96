"""Deleting a token's forks, against the reference with those survivors taken away."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import Case, case_id, random_ids, survivors_of, tiny_model
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.inspection.ablation import ablate, given_survivors, logits_without, survivors_without
from thoughtbubbles.inspection.trace import predictions
from thoughtbubbles.model.reference import ReferenceFork, reference_forward

CASES: list[Case] = [
    {"routing": "causal", "budget": 2},
    {"routing": "causal", "budget": "7/3", "attenuation": "released", "fork_layers": [0, 1, 3]},
    {"routing": "topk", "budget": 2.5, "attenuation": "none"},
    {"routing": "random", "budget": 3, "merge": "probability"},
    {"routing": "uniform", "budget": 2},
    {"routing": "causal", "budget": 2, "fork_content": "attended"},
]
every_case = pytest.mark.parametrize("rules", CASES, ids=case_id)


def bubble_tokens(model: ThoughtbubblesForCausalLM, ids: Tensor) -> list[int]:
    streams = model(ids, output_streams=True).streams
    sizes = torch.stack([each.bubble_sizes()[0] for each in streams]).amax(0)
    return [token for token, size in enumerate(sizes.tolist()) if size > 1]


def reference_without(model: ThoughtbubblesForCausalLM, ids: Tensor, token: int) -> Tensor:
    """[T, V] logits of the reference, the candidates of the token's forks and of what comes of them struck out."""
    survivors = survivors_of(model(ids, output_streams=True).streams, model.config.gated_layers)
    whole = reference_forward(model.config, model.state_dict(), ids, survivors=survivors)
    given: dict[int, list[int]] = {}
    present = list(range(ids.shape[1]))  # the streams of the whole row that are still there
    for layer, fork in whole.forks[0].items():
        spared = [c for c in fork.survivors if fork.candidate_tokens[c] != token or is_root_keep(fork, c)]
        given[layer] = [2 * present.index(c // 2) + c % 2 for c in spared]
        present = [place for place, c in enumerate(fork.survivors) if c in spared]
    return reference_forward(model.config, model.state_dict(), ids, survivors=[given]).logits[0]


def is_root_keep(fork: ReferenceFork, candidate: int) -> bool:
    return not fork.optional[candidate]


@every_case
def test_logits_are_those_of_the_reference_without_the_forks(rules: Case) -> None:
    model, ids = tiny_model(**rules), random_ids(1, 11)
    tokens = bubble_tokens(model, ids)[:5]
    assert tokens
    whole, without = logits_without(model, ids[0].tolist(), tokens)
    torch.testing.assert_close(whole, model(ids).logits)
    for token, logits in zip(tokens, without, strict=True):
        torch.testing.assert_close(logits.double(), reference_without(model, ids, token), atol=1e-4, rtol=0)


@every_case
def test_only_the_forks_of_the_token_go(rules: Case) -> None:
    model, ids = tiny_model(**rules), random_ids(1, 11)
    token = bubble_tokens(model, ids)[0]
    trail = model(ids, output_streams=True).streams
    with given_survivors(model, survivors_without(trail, model.config.gated_layers, [token])):
        without = model(ids, output_streams=True).streams
    for before, after in zip(trail, without, strict=True):
        expected = before.bubble_sizes()[0]
        expected[token] = 1
        assert after.bubble_sizes()[0].tolist() == expected.tolist()


@every_case
def test_change_is_the_difference_of_surprisals(rules: Case) -> None:
    model, ids = tiny_model(**rules), random_ids(1, 11)
    tokens = bubble_tokens(model, ids)[-4:]
    made = ablate(model, ids[0].tolist(), tokens, batch_size=3)
    assert made.tokens == tokens
    whole = predictions(model(ids).logits, ids)[1][0]
    for token, change in zip(tokens, made.change, strict=True):
        without = reference_without(model, ids, token)[None].float()
        expected = predictions(without, ids)[1][0] - whole
        np.testing.assert_allclose(change, expected.detach(), atol=1e-4)
        assert change[:token] == [0] * min(token, 10)
    assert any(abs(value) > 1e-3 for change in made.change for value in change)
    assert made.at_lag(0) == [change[t] for t, change in zip(tokens, made.change, strict=True) if t < 10]
    assert made.at_lag(2) == [change[t + 2] for t, change in zip(tokens, made.change, strict=True) if t < 8]


def test_a_token_without_forks_changes_nothing() -> None:
    model = tiny_model(budget=1)
    np.testing.assert_allclose(ablate(model, [1, 2, 3], [0, 2]).change, [[0, 0], [0, 0]], atol=1e-5)
    assert ablate(model, [1, 2, 3], []).change == []


def test_gates_choose_again_afterwards() -> None:
    model, ids = tiny_model().train(), random_ids(1, 11)
    before = model(ids).logits
    ablate(model, ids[0].tolist(), bubble_tokens(model, ids))
    assert model.training
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("routing", ["none", "copy", "pause"])
def test_without_gates_there_is_nothing_to_delete(routing: str) -> None:
    with pytest.raises(ValueError, match=f"routing='{routing}': expected a model with gates"):
        ablate(tiny_model(routing=routing, budget=2), [1, 2, 3], [1])


@pytest.mark.parametrize(("tokens", "message"), [([3], "token=3: expected one from 0 to 2"), ([-1], "token=-1")])
def test_bad_tokens(tokens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ablate(tiny_model(), [1, 2, 3], tokens)


def test_logits_want_a_token() -> None:
    with pytest.raises(ValueError, match=r"tokens=\[\]: expected at least one"):
        logits_without(tiny_model(), [1, 2, 3], [])
