"""The engine: what it writes is what each answer alone would be, and nobody waits for what is not theirs."""

import copy
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.helpers import LEFT_TO_RIGHT, OTHER_BLOCKS, of_whole_models, tiny_model
from tests.serving.conftest import LONGEST, SIZE, Listener, ScriptedRows, ask, greedy, running, until
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.serving.choosing import Choosing
from thoughtbubbles.serving.engine import BusyError, Engine
from thoughtbubbles.serving.orders import Failed, Finished, Order, Written
from thoughtbubbles.serving.rows import GrowingRows, StaticRows, make_rows
from thoughtbubbles.support.detokenizer import TokenTable
from thoughtbubbles.support.text import decode_after, encode_text

GREEDY = Choosing(temperature=0, alternatives=1)
Start = Callable[..., Engine]
ONE = Fraction(1)


def a_prompt(size: int, seed: int) -> list[int]:
    return torch.randint(3, 200, (size,), generator=torch.Generator().manual_seed(seed)).tolist()


ORDERS = st.lists(
    st.tuples(st.integers(1, 20), st.sampled_from(["1", "1.2", "1.5", "2", "3.5"]), st.integers(1, 10)),
    min_size=1,
    max_size=7,
)


@of_whole_models
@given(
    asked=ORDERS,
    slots=st.integers(1, 4),
    chunk=st.integers(1, 9),
    kind=st.sampled_from(["growing", "static", "static"]),
)
def test_each_answer_is_that_of_generate_alone(
    model: ThoughtbubblesForCausalLM,
    table: TokenTable,
    asked: list[tuple[int, str, int]],
    slots: int,
    chunk: int,
    kind: str,
) -> None:
    rows = GrowingRows(model, slots) if kind == "growing" else StaticRows(model, slots, Fraction(4))
    with running(Engine(rows, table, chunk=chunk)) as engine:
        orders = [
            Order(a_prompt(size, seed), Fraction(budget), most, GREEDY)
            for seed, (size, budget, most) in enumerate(asked)
        ]
        for listener, order in zip(ask(engine, *orders), orders, strict=True):
            ended = listener.end()
            assert isinstance(ended, Finished)
            assert listener.tokens == greedy(model, order.ids, order.most, order.budget)
            read = torch.tensor([[*order.ids, *listener.tokens[:-1]]])
            streams = model(read, budget=order.budget, output_streams=True).streams[-1]
            assert ended == Finished("length", len(order.ids), order.most, int(streams.alive.sum()))


KINDS: list[dict[str, Any]] = [
    {"routing": "none"},
    {"routing": "topk", "budget": 2},
    {"attenuation": "released", "merge": "residual-normed"},
    {"merge": "probability"},
    {"routing": "none", "num_loops": 2},
    *LEFT_TO_RIGHT[::2],
    *OTHER_BLOCKS,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_models_of_every_kind_are_served(table: TokenTable, kind: dict[str, Any]) -> None:
    model = tiny_model(vocab_size=SIZE, max_position_embeddings=LONGEST, **kind).double()
    own = model.config.exact_budget()
    orders = [Order(a_prompt(4 + 3 * n, n), own if n % 2 else ONE, 5, GREEDY) for n in range(5)]
    with running(Engine(make_rows(model, 2, own), table, chunk=5)) as engine:
        for listener, order in zip(ask(engine, *orders), orders, strict=True):
            assert isinstance(listener.end(), Finished)
            assert listener.tokens == greedy(model, order.ids, order.most, order.budget)


def test_text_and_end_are_those_of_generate(
    start: Start, model: ThoughtbubblesForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = encode_text(tokenizer, "the river of")
    written = greedy(model, ids, 12)
    end = written[6]
    cut = written[: written.index(end)]
    [listener] = ask(start(), Order(ids, Fraction(2), 12, GREEDY, ends=frozenset([end])))
    ended = listener.end()
    assert isinstance(ended, Finished)
    assert (ended.reason, ended.tokens) == ("stop", len(cut) + 1)
    assert listener.text == decode_after(tokenizer, ids + cut, len(ids))


def test_a_long_prompt_holds_up_nobody_longer_than_a_chunk(start: Start) -> None:
    rows = ScriptedRows(2)
    rows.gate.clear()
    engine = start(rows, chunk=4)
    [short] = ask(engine, Order([5], ONE, 30))
    until(lambda: ("read", 1) in rows.calls)
    [long] = ask(engine, Order([6] * 41, ONE, 1))
    rows.gate.set()
    short.end(), long.end()
    reads = [place for place, (name, _) in enumerate(rows.calls) if name == "read"][1:]
    assert [rows.calls[place][1] for place in reads] == [4] * 10 + [1]
    assert all(("step", 1) in rows.calls[first:second] for first, second in pairwise(reads))


def test_short_prompts_share_a_chunk(start: Start) -> None:
    rows = ScriptedRows(4)
    rows.gate.clear()
    engine = start(rows, chunk=8)
    [first] = ask(engine, Order([5], ONE, 3))
    until(lambda: ("read", 1) in rows.calls)
    others = ask(engine, *(Order([6] * 3, ONE, 1) for _ in range(3)))
    rows.gate.set()
    for listener in (first, *others):
        listener.end()
    names = [call for call in rows.calls if call[0] in ("read", "step")]
    place = names.index(("read", 3))
    assert names[place : place + 5] == [("read", 3), ("read", 3), ("read", 2), ("step", 1), ("read", 1)]


def test_those_that_wait_are_answered_in_their_order_and_slots_are_used_again(start: Start) -> None:
    rows = ScriptedRows(2)
    listeners = ask(start(rows), *(Order([5 + n], ONE, 2 + n % 2) for n in range(9)))
    assert [listener.end() for listener in listeners] == [
        Finished("length", 1, 2 + n % 2, 4 + 2 * (n % 2)) for n in range(9)
    ]
    begun = [slot for name, slot in rows.calls if name == "begin"]
    assert (len(begun), set(begun)) == (9, {0, 1})


@pytest.mark.parametrize("when", ["waiting", "writing", "reading"])
def test_whoever_leaves_frees_a_slot(start: Start, when: str) -> None:
    rows = ScriptedRows(1)
    rows.gate.clear()
    engine = start(rows, chunk=1)
    first, second = ask(engine, Order([5], ONE, 50), Order([6] * 40, ONE, 50))
    until(lambda: engine.running == 1)
    leaver = first if when == "writing" else second
    if when == "reading":
        engine.cancel([first.ticket])
        rows.gate.set()
        until(lambda: rows.calls.count(("begin", 0)) == 2)
    engine.cancel([leaver.ticket])
    rows.gate.set()
    until(lambda: engine.running + engine.waiting == 0)
    stayer = {"waiting": first, "writing": second}.get(when)
    if stayer is not None:
        assert isinstance(stayer.end(), Finished)
    assert engine.totals.cancelled == (2 if when == "reading" else 1)
    assert not any(isinstance(saying, Finished) for saying in leaver.sayings)
    [after] = ask(engine, Order([7], ONE, 1))
    assert isinstance(after.end(), Finished)


def test_no_more_wait_than_may_and_none_of_a_request_is_taken_then(start: Start) -> None:
    rows = ScriptedRows(1)
    rows.gate.clear()
    engine = start(rows, most_waiting=2)
    [first] = ask(engine, Order([5], ONE, 2))
    until(lambda: engine.running == 1)
    waiting = ask(engine, Order([6], ONE, 2))
    with pytest.raises(BusyError) as caught:
        ask(engine, Order([7], ONE, 2), Order([8], ONE, 2))
    assert 1 <= caught.value.retry_after <= 60
    waiting += ask(engine, Order([9], ONE, 2))
    engine.cancel([waiting[0].ticket])
    waiting += ask(engine, Order([10], ONE, 2))
    rows.gate.set()
    assert [isinstance(each.end(), Finished) for each in (first, *waiting[1:])] == [True] * 3


class BrokenRows(ScriptedRows):
    """Rows of which some fail, or write what is no number."""

    def read(self, slot: int, ids: Any, every: bool = False) -> Tensor:
        if ids[0] == 66:
            raise RuntimeError("no\nmemory")
        logits = super().read(slot, ids, every)
        return logits * torch.nan if ids[0] == 77 else logits


def test_what_fails_ends_alone(start: Start) -> None:
    engine = start(BrokenRows(3))
    good, broken, lost, later = ask(engine, *(Order([first], ONE, 5) for first in (5, 66, 77, 8)))
    assert broken.end() == Failed("the model failed: no memory")
    assert lost.end() == Failed("the model failed: the model's logits are not finite")
    assert isinstance(good.end(), Finished)
    assert isinstance(later.end(), Finished)
    assert (engine.totals.finished, engine.totals.failed, engine.running) == (2, 2, 0)


class BrokenStep(ScriptedRows):
    """Rows whose third step fails."""

    def step(self, tokens: Tensor, active: Any) -> Tensor:
        logits = super().step(tokens, active)
        if sum(name == "step" for name, _ in self.calls) == 3:
            raise RuntimeError("a step")
        return logits


def test_a_step_that_fails_ends_those_that_write_and_the_engine_goes_on(start: Start) -> None:
    engine = start(BrokenStep(2))
    first, second, third = ask(engine, *(Order([n], ONE, 9) for n in (5, 6, 7)))
    assert first.end() == second.end() == Failed("the model failed: a step")
    assert isinstance(third.end(), Finished)


class LostRows(ScriptedRows):
    """Rows of a device that is lost."""

    def step(self, tokens: Tensor, active: Any) -> Tensor:
        super().step(tokens, active)
        raise RuntimeError("the device is lost")

    def end(self, slot: int) -> None:
        raise RuntimeError("the device is lost")


def test_a_device_that_is_lost_leaves_nobody_waiting(start: Start) -> None:
    rows = LostRows(1)
    rows.gate.clear()
    engine = start(rows)
    first, second = ask(engine, Order([5], ONE, 50), Order([6], ONE, 50))
    until(lambda: engine.running == 1)
    assert engine.is_alive
    rows.gate.set()
    assert first.end() == second.end() == Failed("the server is stopping: try another", again=True)
    until(lambda: not engine.is_alive)
    with pytest.raises(BusyError, match="stopping"):
        ask(engine, Order([5], ONE, 1))


def test_the_end_fails_what_is_not_answered(start: Start) -> None:
    rows = ScriptedRows(1)
    rows.gate.clear()
    engine = start(rows)
    first, second = ask(engine, Order([5], ONE, 50), Order([6], ONE, 50))
    until(lambda: engine.running == 1)
    engine._closing = True
    rows.gate.set()
    engine.close()
    stopping = Failed("the server is stopping: try another", again=True)
    assert first.end() == second.end() == stopping
    with pytest.raises(BusyError, match="stopping"):
        ask(engine, Order([5], ONE, 1))


def test_stop_strings_that_straddle_tokens(start: Start, tokenizer: PreTrainedTokenizerFast) -> None:
    script = encode_text(tokenizer, "the deep river of stone")
    rows = ScriptedRows(2, {5: script})
    stops = "p riv", "nowhere"
    [listener] = ask(start(rows), Order([5], ONE, 90, GREEDY, stops=stops))
    ended = listener.end()
    assert isinstance(ended, Finished)
    assert (ended.reason, listener.text) == ("stop", "the dee")
    starts = [decode_after(tokenizer, script[:place], 0) for place in range(len(script))]
    kept = [token for token, before in zip(script, starts, strict=True) if len(before) < len("the dee")]
    assert listener.tokens == kept
    said = [saying.text for saying in listener.sayings if isinstance(saying, Written)]
    assert "".join(said) == "the dee"
    assert ended.tokens == len(kept) + 1


def test_a_stop_string_may_end_with_the_answer(start: Start, tokenizer: PreTrainedTokenizerFast) -> None:
    script = encode_text(tokenizer, "the river")
    [listener] = ask(start(ScriptedRows(1, {5: script})), Order([5], ONE, len(script), stops=["river."]))
    assert listener.end() == Finished("length", 1, len(script), 2 * len(script))
    assert listener.text == "the river"


def test_an_answer_of_a_chat_is_trimmed(start: Start, tokenizer: PreTrainedTokenizerFast) -> None:
    script = encode_text(tokenizer, " \n the river \nENDED of END \n")
    rows = ScriptedRows(1, {5: script})
    [listener] = ask(start(rows), Order([5], ONE, len(script), tail="END"))
    listener.end()
    said = [saying.text for saying in listener.sayings if isinstance(saying, Written)]
    assert "".join(said) == "the river \nENDED of"
    assert said[0].strip()
    assert len(said) > 3


def test_in_single_precision_answers_differ_where_rounding_decides_alone(
    model: ThoughtbubblesForCausalLM, table: TokenTable
) -> None:
    single: Any = copy.deepcopy(model).float()
    orders = [Order(a_prompt(3 + n, n), Fraction(1 + n % 4, 1 + n % 2), 12, GREEDY) for n in range(12)]
    orders = [replace(order, budget=max(order.budget, ONE)) for order in orders]
    differing = 0
    with running(Engine(StaticRows(single, 5, Fraction(4)), table, chunk=4)) as engine:
        for listener, order in zip(ask(engine, *orders), orders, strict=True):
            listener.end()
            alone = greedy(single, order.ids, order.most, order.budget)
            pairs = zip(listener.tokens, alone, strict=True)
            first = next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
            if first is not None:
                differing += 1
                row = torch.tensor([[*order.ids, *alone[:first]]])
                best = single(row, budget=order.budget).logits[0, -1].topk(2).values
                assert float(best[0] - best[1]) < 1e-3
    assert differing <= 2


def test_offsets_are_those_of_the_text(start: Start, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, script = encode_text(tokenizer, "a € "), encode_text(tokenizer, "the € river")
    order = Order(prompt, ONE, len(script), GREEDY, echo=len(prompt))
    [listener] = ask(start(ScriptedRows(1, {prompt[0]: script})), order)
    listener.end()
    assert listener.text == "a € the € river"
    placed = [each for saying in listener.sayings if isinstance(saying, Written) for each in saying.scores]
    assert [each.score.token for each in placed] == prompt + script
    before = [tokenizer.decode((prompt + script)[:n]).rstrip("\ufffd") for n in range(len(placed))]
    assert [each.offset for each in placed] == [len(text) for text in before]


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("before", [0, 1])
def test_echoed_scores_are_the_models_own(
    start: Start, model: ThoughtbubblesForCausalLM, chunk: int, before: int
) -> None:
    ids = a_prompt(11, 3)
    order = Order(ids, Fraction(3, 2), 2, Choosing(temperature=0, alternatives=3), echo=len(ids) - before)
    [listener] = ask(start(chunk=chunk), order)
    listener.end()
    written = greedy(model, ids, 2, Fraction(3, 2))
    whole = torch.tensor([[*ids, *written]])
    expected = model(whole, budget=Fraction(3, 2)).logits[0].log_softmax(-1).detach()
    placed = [each for saying in listener.sayings if isinstance(saying, Written) for each in saying.scores]
    assert [each.score.token for each in placed] == [*ids[before:], *written]
    if before == 0:
        assert placed[0].score.logprob is None
        assert placed[0].score.top == ()
    for place, each in list(enumerate(placed, start=before))[1 - before :]:
        row = expected[place - 1]
        assert each.score.logprob == pytest.approx(float(row[each.score.token]), abs=1e-9)
        assert [token for token, _ in each.score.top] == row.topk(3).indices.tolist()


def test_a_prompt_can_be_scored_alone(start: Start) -> None:
    rows = ScriptedRows(1)
    [listener] = ask(start(rows), Order([5, 6, 7], ONE, 0, GREEDY, echo=3))
    assert listener.end() == Finished("length", 3, 0, 6)
    assert listener.tokens == [5, 6, 7]
    assert not any(name == "step" for name, _ in rows.calls)


def test_a_seed_gives_the_same_answer_whatever_else_is_served(start: Start, model: ThoughtbubblesForCausalLM) -> None:
    rule = Choosing(temperature=1.2, top_p=0.95, seed=4, alternatives=0)
    order = Order(a_prompt(7, 1), Fraction(2), 12, rule)
    [alone] = ask(start(slots=1), order)
    alone.end()
    others = [Order(a_prompt(3 + n, n), Fraction(1), 5 + n, Choosing(seed=n, temperature=1.5)) for n in range(5)]
    *_, beside = ask(start(slots=3, chunk=2), *others, order)
    beside.end()
    assert alone.tokens == beside.tokens
    assert alone.tokens != greedy(model, order.ids, 12)
    [other] = ask(start(slots=1), Order(order.ids, order.budget, 12, Choosing(1.2, 0.95, seed=5, alternatives=0)))
    other.end()
    assert other.tokens != alone.tokens


def test_nothing_is_left_of_answers(start: Start) -> None:
    engine = start(slots=2)
    listeners: list[Listener] = ask(engine, *(Order(a_prompt(5, n), ONE, 3) for n in range(6)))
    for listener in listeners:
        listener.end()
    until(lambda: engine.running == 0)
    rows = engine._model
    assert isinstance(rows, StaticRows)
    assert rows._cache.frame.tokens == [0, 0]
    assert (engine.totals.prompt_tokens, engine.totals.tokens, engine.totals.finished) == (30, 18, 6)
    assert engine.totals.streams == 6 * 7
