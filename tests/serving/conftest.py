"""A tiny model in double precision with a tokenizer, and rows that write what a test says."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.helpers import tiny_model
from tests.tokenizer_kinds import byte_level
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.data.tokenizer import load_data_tokenizer
from thoughtbubbles.serving.engine import Engine
from thoughtbubbles.serving.orders import Failed, Finished, Order, Saying, Ticket, Written
from thoughtbubbles.serving.rows import StaticRows
from thoughtbubbles.support.detokenizer import TokenTable

TEMPLATE = Path(__file__).parents[2] / "recipes" / "chat.jinja"
LONGEST = 96
SIZE = 320  # of the vocabulary of scripted rows


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Byte-level, with a chat template."""
    made = load_data_tokenizer(byte_level(tmp_path_factory.mktemp("served"), "<s>", "</s>"))
    made.chat_template = TEMPLATE.read_text()
    return made


@pytest.fixture(scope="session")
def table(tokenizer: PreTrainedTokenizerFast) -> TokenTable:
    return TokenTable(tokenizer)


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> ThoughtbubblesForCausalLM:
    """It writes words rather than bytes, and rarely the end of a text."""
    made = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=LONGEST)
    for token in range(len(tokenizer)):
        if len(tokenizer.decode([token]).strip()) < 3:
            made.model.embed_tokens.weight.data[token] *= 0.1
    return made.double()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def greedy(model: Any, ids: Sequence[int], count: int, budget: Any = None, ends: Sequence[int] = ()) -> list[int]:
    """What `generate` writes after some tokens, alone."""
    row = torch.tensor([list(ids)])
    out = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=count,
        do_sample=False,
        budget=budget,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
    )
    written: list[int] = out[0, len(ids) :].tolist()
    return written


class ScriptedRows:
    """Rows that write the tokens of a script, whatever they read, and note what was asked of them.

    Attributes:
        script: for each first token of a prompt, the tokens to write.
        calls: `begin`, `read` with how many tokens, `step` with how many rows, `end`.
        gate: what a step waits for.
    """

    longest = LONGEST

    def __init__(self, slots: int, script: dict[int, list[int]] | None = None) -> None:
        self.slots, self.script = slots, script or {}
        self.calls: list[tuple[str, int]] = []
        self.gate = Event()
        self.gate.set()
        self._first: list[int | None] = [None] * slots
        self._read, self._written = [0] * slots, [0] * slots

    def begin(self, slot: int, budget: Fraction) -> None:
        assert self._first[slot] is None
        self.calls.append(("begin", slot))
        self._read[slot] = self._written[slot] = 0

    def read(self, slot: int, ids: Sequence[int], every: bool = False) -> Tensor:
        self.calls.append(("read", len(ids)))
        if self._first[slot] is None:
            self._first[slot] = ids[0]
        self._read[slot] += len(ids)
        row = self._logits(slot)
        return row.expand(len(ids), -1) if every else row

    def step(self, tokens: Tensor, active: Sequence[bool]) -> Tensor:
        assert self.gate.wait(60)
        self.calls.append(("step", sum(active)))
        out = torch.zeros(self.slots, SIZE)
        for slot, goes_on in enumerate(active):
            if goes_on:
                self._written[slot] += 1
                out[slot] = self._logits(slot)
        return out

    def end(self, slot: int) -> None:
        self.calls.append(("end", slot))
        self._first[slot] = None

    def streams(self, slot: int) -> int:
        return 2 * (self._read[slot] + self._written[slot])

    def _logits(self, slot: int) -> Tensor:
        first = self._first[slot]
        assert first is not None
        script = self.script.get(first, [first])
        logits = torch.zeros(SIZE)
        logits[script[min(self._written[slot], len(script) - 1)]] = 9.0
        return logits


class Listener:
    """Hears what an engine says of an order."""

    def __init__(self, order: Order) -> None:
        self.ticket = Ticket(order, self._hear)
        self.sayings: list[Saying] = []
        self._ended = Event()

    def _hear(self, saying: Saying) -> None:
        self.sayings.append(saying)
        if not isinstance(saying, Written):
            self._ended.set()

    def end(self) -> Finished | Failed:
        """How it ended, once it has."""
        assert self._ended.wait(60)
        last = self.sayings[-1]
        assert not isinstance(last, Written)
        return last

    @property
    def text(self) -> str:
        return "".join(saying.text for saying in self.sayings if isinstance(saying, Written))

    @property
    def tokens(self) -> list[int]:
        written = [saying for saying in self.sayings if isinstance(saying, Written)]
        return [each.score.token for saying in written for each in saying.scores]


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def start(model: ThoughtbubblesForCausalLM, table: TokenTable) -> Iterator[Callable[..., Engine]]:
    """Makes engines of the tiny model, or of given rows, and ends them."""
    engines: list[Engine] = []

    def make(rows: Any = None, slots: int = 3, **options: Any) -> Engine:
        engine = Engine(rows or StaticRows(model, slots, Fraction(4)), table, **options)
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def ask(engine: Engine, *orders: Order) -> list[Listener]:
    """Submit orders."""
    listeners = [Listener(order) for order in orders]
    engine.submit([listener.ticket for listener in listeners])
    return listeners
