"""Many clients and many requests."""

import gc
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from tests.serving.conftest import greedy, until
from tests.serving.test_server import client_of, serving
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.serving.served import Limits
from thoughtbubbles.support.text import text_ends

pytestmark = pytest.mark.long
BUDGETS = [1, "1.2", 1.5, 2, "7/3", 4]


def test_sixty_four_clients_get_what_generate_writes(
    model: ThoughtbubblesForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked = [([3 + (7 * n + 5 * k) % 290 for k in range(1 + n)], BUDGETS[n % 6], 1 + n % 30) for n in range(64)]
    ends = text_ends(tokenizer, model.generation_config)

    with serving(model, tokenizer, slots=16, limits=Limits(budget=4)) as live:

        def ask(number: int) -> list[str]:
            ids, budget, most = asked[number]
            client: Any = client_of(live)
            settings = {"model": "tiny", "prompt": ids, "temperature": 0, "max_tokens": most, "logprobs": 0}
            made = client.completions.create(**settings, extra_body={"budget": budget}, stream=number % 2 == 0)
            parts = list(made) if number % 2 == 0 else [made]
            choices = [choice for part in parts for choice in part.choices if choice.logprobs is not None]
            return [name for choice in choices for name in choice.logprobs.tokens]

        with ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(ask, range(64)))
        table = live._service.served.table
    for (ids, budget, most), answer in zip(asked, answers, strict=True):
        written = [token for token in greedy(model, ids, most, budget, ends) if token not in ends]
        assert answer == [table.name(token) for token in written]


@pytest.mark.timeout(3000)
def test_ten_thousand_requests_leave_nothing(
    model: ThoughtbubblesForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    process = psutil.Process()
    bodies = [
        {"prompt": [5, 6, 7], "max_tokens": 1},
        {"prompt": "the river", "max_tokens": 2, "logprobs": 2, "stream": True},
        {"prompt": "x" * 2000},
        {"prompt": [5], "max_tokens": 1, "temperature": 0, "n": 2, "stop": ["e"]},
        {"nothing": None},
    ]
    with serving(model, tokenizer, slots=8) as live, httpx.Client(timeout=120) as client:

        def ask(count: int) -> int:
            for number in range(count):
                client.post(f"{live.address}/v1/completions", content=json.dumps(bodies[number % 5]))
            gc.collect()
            return int(process.memory_info().rss)

        ask(1000)
        before, objects = ask(1000), len(gc.get_objects())
        after = ask(8000)
        until(lambda: live.engine.running == 0)
        gc.collect()
        assert len(gc.get_objects()) - objects < 2000
    assert after - before < 16 * 2**20
