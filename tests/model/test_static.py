"""The cache of fixed shapes against the full forward, rows that come and go, budgets of rows (method: Cache)."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import LEFT_TO_RIGHT, OTHER_BLOCKS, of_whole_models
from tests.model.test_cache import LENGTH, agree, ids_and_mask, in_chunks, make
from thoughtbubbles.model.budget import RowBudgets
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.graph import StepGraph
from thoughtbubbles.model.routing import Candidates, route_causal, route_step
from thoughtbubbles.model.static import StaticStreamCache
from thoughtbubbles.model.threshold import route_threshold

CHUNKS = ([1] * LENGTH, [LENGTH], [9, 1, 1, 5, 7])
BY_ROW: list[dict[str, Any]] = [
    {"routing": "causal"},
    {"routing": "causal", "fork_content": "attended"},
    {"routing": "threshold"},
    {"routing": "random", "routing_seed": 4},
    {"routing": "uniform"},
]
BUDGETS: list[Any] = [1, 2, 1.5, "4/3"]
by_row = pytest.mark.parametrize("rules", BY_ROW, ids=lambda rules: " ".join(map(str, rules.values())))


def static(model: Any, rows: int, longest: int = LENGTH, fixed: bool = True) -> StaticStreamCache:
    return StaticStreamCache(rows, longest, model.config.budget, fixed=fixed)


@torch.no_grad()
def check(model: Any, rows: int, *splits: list[int], longest: int = LENGTH) -> None:
    ids, mask = ids_and_mask(rows)
    full = model(ids, attention_mask=mask).logits
    for chunks in splits:
        for fixed in (True, False):
            assert agree(in_chunks(model, ids, mask, chunks, static(model, rows, longest, fixed)), full, mask)


@pytest.mark.parametrize("budget", [1, 1.5, 2, 4])
@pytest.mark.parametrize(("rows", "attenuation"), [(1, "paper"), (5, "paper"), (5, "released"), (5, "none")])
def test_each_step_gives_the_logits_of_the_full_forward(budget: float, attenuation: str, rows: int) -> None:
    check(make(budget=budget, attenuation=attenuation), rows, *CHUNKS)


@pytest.mark.parametrize("rules", LEFT_TO_RIGHT, ids=str)
def test_each_step_by_other_rules(rules: dict[str, Any]) -> None:
    check(make(**rules), 4, *CHUNKS, longest=100)


@pytest.mark.parametrize("merge", ["residual-normed", "probability", "root"])
def test_every_merge(merge: str) -> None:
    check(make(merge=merge), 4, CHUNKS[2])


@pytest.mark.parametrize("block", OTHER_BLOCKS, ids=["llama", "neox", "both"])
def test_each_step_by_other_blocks(block: dict[str, Any]) -> None:
    check(make(**block), 4, CHUNKS[2])


@by_row
@torch.no_grad()
def test_rows_with_their_own_budgets_are_those_rows_alone(rules: dict[str, Any]) -> None:
    model = make(budget=2, **rules)
    ids, mask = ids_and_mask(4)
    together = model(ids, attention_mask=mask, budget=BUDGETS).logits
    for row, budget in enumerate(BUDGETS):
        at = slice(row, row + 1)
        alone = model(ids[at], attention_mask=mask[at], budget=budget).logits
        assert agree(together[at], alone, mask[at])
    for cache in (StreamCache(), static(model, 4)):
        found = [
            model(ids[:, begin:end], attention_mask=mask[:, :end], cache=cache, budget=BUDGETS).logits
            for begin, end in ((0, 9), (9, 10), (10, LENGTH))
        ]
        assert agree(torch.cat(found, 1), together, mask)
    order = torch.tensor([2, 0, 0, 3])
    cache = static(model, 4)
    model(ids[:, :-1], attention_mask=mask[:, :-1], cache=cache, budget=BUDGETS)
    cache.reorder_cache(order)
    last = model(
        ids[order, -1:], attention_mask=mask[order], cache=cache, budget=[BUDGETS[row] for row in order]
    ).logits
    assert agree(last, together[order, -1:], mask[order, -1:])


class Rows:
    """Texts in the rows of a static cache: what was found of each, and what it should be."""

    def __init__(self, model: Any, rows: int) -> None:
        self.model, self.cache = model, StaticStreamCache(rows, LENGTH, 2, fixed=True)
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.found: list[list[Tensor]] = [[] for _ in range(rows)]
        self.cache.begin(model.config, RowBudgets([Fraction(1)] * rows), rows)
        self.step([True] * rows)
        for row in range(rows):
            self.cache.clear(row)
            self.texts[row], self.found[row] = [], []

    def ids(self, count: int) -> list[int]:
        return torch.randint(31, (count,)).tolist()

    def fill(self, row: int, budget: Fraction, lengths: list[int]) -> None:
        """Check what is there, and begin another text, so many tokens at a time."""
        self.check(row)
        self.cache.clear(row, budget)
        self.texts[row], self.found[row] = [], []
        for length in lengths:
            ids = self.ids(length)
            with self.cache.row(row) as part:
                logits = self.model(torch.tensor([ids]), cache=part, budget=[budget]).logits[0]
            self.texts[row] += ids
            self.found[row] += [*logits]

    def step(self, active: list[bool]) -> None:
        active = [is_active and len(text) < LENGTH for is_active, text in zip(active, self.texts, strict=True)]
        ids = self.ids(len(active))
        self.cache.step(active)
        logits = self.model.advance(torch.tensor(ids)[:, None], torch.tensor(active)[:, None], self.cache)
        for row, is_active in enumerate(active):
            if is_active:
                self.texts[row].append(ids[row])
                self.found[row].append(logits[row])

    def check(self, row: int) -> None:
        if self.texts[row]:
            assert isinstance(self.cache.budget, RowBudgets)
            ids = torch.tensor([self.texts[row]])
            alone = self.model(ids, budget=self.cache.budget.exact[row]).logits
            assert agree(torch.stack(self.found[row])[None], alone, None)


@of_whole_models
@given(
    st.sampled_from(BY_ROW),
    st.lists(
        st.one_of(
            st.tuples(
                st.integers(0, 2),
                st.sampled_from([Fraction(1), Fraction(3, 2), Fraction(2)]),
                st.lists(st.integers(1, 7), min_size=1, max_size=3),
            ),
            st.lists(st.booleans(), min_size=3, max_size=3),
        ),
        max_size=12,
    ),
)
@torch.no_grad()
def test_rows_are_emptied_and_filled_in_any_order(rules: dict[str, Any], actions: list[Any]) -> None:
    rows = Rows(make(budget=2, **rules), 3)
    for action in actions:
        if isinstance(action, list):
            rows.step(action)
        else:
            rows.fill(*action)
    for row in range(3):
        rows.check(row)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Candidates, Tensor, Tensor]:
    """The candidates of one token of two rows, some of them dead, and a past."""
    streams = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    alive = torch.arange(streams) < torch.randint(streams + 1, (2, 1), generator=generator)
    is_root = alive & ~torch.nn.functional.pad(alive, (0, 1))[:, 1:]
    optional = torch.stack([alive, alive & ~is_root], 2).flatten(1)
    token = torch.full((2, 2 * streams), draw(st.integers(0, 9)))
    scores = -torch.randint(4, token.shape, generator=generator) / 3
    past = -torch.randint(4, (2, 6), generator=generator) / 3
    budget = draw(st.sampled_from([Fraction(1), Fraction(3, 2), Fraction(9, 4), Fraction(5)]))
    candidates = Candidates(scores, token, optional, alive.repeat_interleave(2, 1), budget, single=True)
    return candidates, past, torch.randint(4, (2,), generator=generator)


@given(steps())
def test_one_token_is_routed_as_any_other(case: tuple[Candidates, Tensor, Tensor]) -> None:
    candidates, past, admitted = case
    assert torch.equal(route_step(candidates, past, admitted), route_causal(*candidates[:5], past, admitted))
    assert torch.equal(route_step(candidates), route_causal(*candidates[:5]))
    by_threshold = route_threshold(*candidates[:5], -0.5, admitted)
    assert torch.equal(route_step(candidates, None, admitted, -0.5), by_threshold)


class Reads(TorchDispatchMode):
    """Counts values that a device hands to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@by_row
def test_a_step_reads_nothing_back(rules: dict[str, Any]) -> None:
    model = make(budget=2, **rules)
    rows = Rows(model, 2)
    with Reads() as growing:
        model(torch.tensor([[1]]), cache=StreamCache())
    assert growing.count > 0
    shapes = []
    for _ in range(4):
        rows.cache.step([True, False])
        with Reads() as reads:
            logits = model.advance(torch.tensor([[1], [2]]), torch.tensor([[True], [False]]), rows.cache)
        assert reads.count == 0
        shapes.append([tensor.shape for tensor in rows.cache._tensors()])
    assert all(shape == shapes[0] for shape in shapes)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "arguments", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"budget": 1.5}], ids=str
)
def test_generate_is_the_same_with_either_cache(arguments: dict[str, Any]) -> None:
    model = make(budget=2)
    ids, mask = ids_and_mask(3)
    found = []
    for kind in ("dynamic", "static"):
        torch.manual_seed(1)
        settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **arguments}
        found.append(model.generate(ids, attention_mask=mask, cache_implementation=kind, **settings))
    assert torch.equal(*found)


@by_row
@torch.no_grad()
def test_a_compiled_step_is_the_step(rules: dict[str, Any]) -> None:
    """There is a graph for each power of two of tokens, and none is made after `prepare`."""
    model = make(budget=2, num_hidden_layers=2, fork_layers=[0, 1], **rules)
    ids, mask = ids_and_mask(2)
    ids, mask = torch.cat([ids] * 4, 1), torch.cat([mask] * 4, 1)
    full = model(ids, attention_mask=mask).logits
    cache = StaticStreamCache(2, 100, 2, fixed=True)
    found = [model(ids[:, :60], attention_mask=mask[:, :60], cache=cache).logits]
    cache.graph = StepGraph(model.advance, cache, backend="eager")
    before = counters["stats"]["unique_graphs"]
    cache.graph.prepare()
    made = counters["stats"]["unique_graphs"] - before
    for column in range(60, ids.shape[1]):
        at = slice(column, column + 1)
        found.append(model(ids[:, at], attention_mask=mask[:, : column + 1], cache=cache).logits)
    with pytest.raises(ValueError, match="budget=1: expected 2, with which the cache was filled"):
        model(ids[:, :1], cache=cache, budget=1)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 1\): expected \(2, 93\)"):
        model(ids[:, :1], attention_mask=mask[:, :1], cache=cache)
    assert agree(torch.cat(found, 1), full, mask)
    assert counters["stats"]["unique_graphs"] - before == made == 2


def test_what_it_cannot_do_is_refused() -> None:
    model, ids = make(budget=2), torch.randint(31, (2, 9))
    cache = StaticStreamCache(2, 12, 2)
    model(ids, cache=cache)
    assert cache.get_seq_length() == 9
    assert cache.get_max_length() == cache.get_max_cache_shape() == 12
    assert cache.nbytes > 0
    with pytest.raises(ValueError, match="13 tokens: expected at most 12"):
        model(ids[:, :4], cache=cache)
    with pytest.raises(ValueError, match="tokens_to_remove=-1: a static cache cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="4 rows: expected 2"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="batch of 1 rows: expected 2"):
        model(ids[:1, :1], cache=cache)
    with pytest.raises(ValueError, match=r"budget=3: expected at most 2, for which the cache has room"):
        model(ids, cache=StaticStreamCache(2, 12, 2), budget=3)
    with pytest.raises(ValueError, match=r"budget=\[1, 2, 2\]: expected one, or one for each of 2 rows"):
        model(ids, budget=[1, 2, 2])
    for others in ({"routing": "topk"}, {"routing": "none"}, {"attenuation": "released"}):
        with pytest.raises(ValueError, match=r"budget=\[1, 2\]: expected one for all rows with routing"):
            make(**others)(ids, budget=[1, 2])
    with pytest.raises(ValueError, match=r"budget=3: expected at most 2"):
        cache.clear(0, budget=3)
    assert [StaticStreamCache(1, 1, 1, device).fixed for device in ("cpu", "meta")] == [False, True]
    cache.reset()
    assert not cache.is_initialized
    for _ in range(12):
        model(ids[:, :1], cache=cache)
    with pytest.raises(ValueError, match=r"rows \[0\]: expected fewer than 12 tokens in each"):
        cache.step([True, False])
