"""A routing rule that a test adds to `RULES` works everywhere."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import random_ids, random_model, tiny_config
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.model.accounting import cache_bytes, layer_widths
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.memory import RouteMemory
from thoughtbubbles.model.routing import Candidates, Router, Rule
from thoughtbubbles.model.rules import RULES
from thoughtbubbles.model.sharing import write_model_card


class NoMemory(RouteMemory):
    """Nothing is remembered."""

    @staticmethod
    def planned_bytes(optional: int, admitted: int) -> int:
        return 0


class EvenRouter(Router):
    """Every root of an even token forks; others never do."""

    def whole(self, candidates: Candidates) -> Tensor:
        follows_none = torch.nn.functional.pad(candidates.token, (1, 0), value=-1)[:, :-1] != candidates.token
        assert isinstance(candidates.budget, Fraction)
        first = follows_none & (candidates.token % 2 == 0) & candidates.optional
        return first & (candidates.budget >= 2) | (candidates.alive & ~candidates.optional)

    def further(self, candidates: Candidates, memory: Any) -> Tensor:
        return self.whole(candidates)


@pytest.fixture(autouse=True)
def rule(monkeypatch: pytest.MonkeyPatch) -> Rule:
    even = Rule("even", "even: tokens at even places fork", router=lambda *_: EvenRouter(), memory=NoMemory)
    monkeypatch.setitem(RULES, even.name, even)
    return even


def test_it_routes_trains_and_decodes_exactly() -> None:
    model = random_model(tiny_config(routing="even", budget=2, fork_layers=[1]))
    ids = random_ids(2, 11)
    out = model(ids, labels=ids, output_streams=True)
    out.loss.backward()
    assert out.streams[-1].alive.sum(1).tolist() == [17, 17]
    whole = model.double().eval()(ids).logits
    cache = StreamCache()
    pieces = [model(ids[:, first:end], cache=cache).logits for first, end in ((0, 4), (4, 5), (5, 11))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 14)
    assert all(memory.planned_bytes(9, 9) == 0 for memory in cache.forks.values())


def test_the_rest_of_the_package_knows_it(tmp_path: Path, rule: Rule) -> None:
    config = tiny_config(routing="even", budget=2, fork_layers=[1])
    assert (config.gated_layers, config.leaks, config.rule) == ((1,), False, rule)
    assert layer_widths(config, 8)[-1] == rule.width_after(8, 8, Fraction(2)) == 16
    assert cache_bytes(config, 8) < cache_bytes(tiny_config(budget=2, fork_layers=[1]), 8)
    write_model_card(tmp_path, config)
    assert rule.words in (tmp_path / "README.md").read_text()
    model = random_model(config)
    model.save_pretrained(tmp_path / "model")
    assert ThoughtbubblesForCausalLM.from_pretrained(tmp_path / "model").config.routing == "even"


def test_an_unknown_one_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"routing='odd': expected one of causal, .*, uniform, even"):
        ThoughtbubblesConfig(routing="odd")
