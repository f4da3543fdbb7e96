"""A live server, asked by OpenAI's client and by rude ones."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.serving.conftest import LONGEST, ScriptedRows, greedy, until
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.evaluation.conversation import Chat
from thoughtbubbles.evaluation.generation import Decoding, Sampling, generate_text
from thoughtbubbles.serving import application, guard, server
from thoughtbubbles.serving.requests import ChatFields, CompletionFields
from thoughtbubbles.serving.served import Limits
from thoughtbubbles.serving.server import ApiServer
from thoughtbubbles.support.text import encode_text, start_document, text_ends

openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'thoughtbubbles[dev]'")
for _needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(_needed, reason=f"{_needed} is not installed: pip install 'thoughtbubbles[serve]'")

GUIDE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
PROMPTS = ["the river", "stone", "", "the green house under the small cloud", "deep bread sing"]
BUDGETS = [1, 1.2, 1.5, 2, "7/3"]
QUESTION = [{"role": "user", "content": "the river of stone"}]


@contextmanager
def serving(model: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Iterator[ApiServer]:
    running = ApiServer("tiny", model, tokenizer, port=0, **options)
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def live(model: ThoughtbubblesForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[ApiServer]:
    with serving(model, tokenizer, slots=3, limits=Limits(budget=3)) as found:
        yield found


@pytest.fixture
def scripted(
    model: ThoughtbubblesForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ApiServer, ScriptedRows]]:
    """A server of one slot, with one more that may wait, that writes what a script says."""
    rows = ScriptedRows(1)
    monkeypatch.setattr(application, "make_rows", lambda *_: rows)
    with serving(model, tokenizer, slots=1, most_waiting=1) as found:
        yield found, rows
        rows.gate.set()


def client_of(live: ApiServer, key: str = "none", retries: int = 0) -> Any:
    return openai.OpenAI(base_url=f"{live.address}/v1", api_key=key, max_retries=retries, timeout=120)


@pytest.fixture(scope="module")
def client(live: ApiServer) -> Any:
    return client_of(live)


def expected_text(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, count: int, budget: Any) -> str:
    return generate_text(model, tokenizer, prompt, count, Sampling(0), budget).continuation


def streamed(chunks: Any) -> tuple[str, str | None]:
    """The text of a stream of completions, and how it ended."""
    text, reason = "", None
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
    return text, reason


@pytest.mark.parametrize("stream", [False, True])
def test_many_clients_at_once_get_what_generate_writes(
    client: Any, model: ThoughtbubblesForCausalLM, tokenizer: PreTrainedTokenizerFast, stream: bool
) -> None:
    def ask(number: int) -> tuple[str, str | None]:
        settings = {"budget": BUDGETS[number % 5]}
        made = client.completions.create(
            model="tiny",
            prompt=PROMPTS[number % len(PROMPTS)],
            max_tokens=4 + number,
            temperature=0,
            stream=stream,
            extra_body=settings,
        )
        return streamed(made) if stream else (made.choices[0].text, made.choices[0].finish_reason)

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, range(10)))
    for number, (text, reason) in enumerate(answers):
        prompt, budget = PROMPTS[number % len(PROMPTS)], BUDGETS[number % 5]
        assert text == expected_text(model, tokenizer, prompt, 4 + number, budget)
        assert reason in ("stop", "length")


def test_a_completion_in_openais_shape(client: Any, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    made = client.completions.create(model="tiny", prompt="the river", temperature=0, logprobs=2)
    ids = start_document(tokenizer) + encode_text(tokenizer, "the river")
    written = greedy(model, ids, 16, ends=text_ends(tokenizer, model.generation_config))
    assert (made.object, made.model, len(made.choices)) == ("text_completion", "tiny", 1)
    usage = made.usage
    read = torch.tensor([[*ids, *written[:-1]]])
    streams = int(model(read, output_streams=True).streams[-1].alive.sum())
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        len(ids),
        len(written),
        len(ids) + len(written),
    )
    assert usage.streams == streams
    logprobs = made.choices[0].logprobs
    rows = model(torch.tensor([[*ids, *written]])).logits[0].detach().log_softmax(-1)[len(ids) - 1 : -1]
    own = [float(row[token]) for row, token in zip(rows, written, strict=True)]
    assert logprobs.token_logprobs == pytest.approx(own[: len(logprobs.tokens)], abs=1e-9)
    assert "".join(logprobs.tokens) == made.choices[0].text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:n])) for n in range(len(logprobs.tokens))]
    assert all(
        len(top) in (2, 3) and max(top.values()) == top[token]
        for top, token in zip(logprobs.top_logprobs, logprobs.tokens, strict=True)
    )


def test_streamed_logprobs_are_those_of_the_whole(client: Any) -> None:
    asked = {"model": "tiny", "prompt": "stone", "temperature": 0, "logprobs": 1, "echo": True, "max_tokens": 6}
    whole = client.completions.create(**asked).choices[0].logprobs
    parts = [
        choice.logprobs
        for chunk in client.completions.create(**asked, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
    ]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [each for part in parts for each in getattr(part, name)] == getattr(whole, name)


def test_several_answers_to_several_prompts(
    client: Any, model: ThoughtbubblesForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked = {"model": "tiny", "prompt": ["the", "river"], "n": 2, "temperature": 0, "max_tokens": 3}
    made = client.completions.create(**asked)
    texts = [choice.text for choice in sorted(made.choices, key=lambda choice: choice.index)]
    assert texts == [expected_text(model, tokenizer, prompt, 3, None) for prompt in ("the", "the", "river", "river")]
    assert made.usage.completion_tokens == 12
    assert made.usage.prompt_tokens == 4
    parts = ["", "", "", ""]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    assert parts == texts


def test_a_seed_is_reproducible_and_answers_differ(client: Any) -> None:
    def texts(**settings: Any) -> list[str]:
        made = client.completions.create(model="tiny", prompt="the", n=3, max_tokens=12, **settings)
        return [choice.text for choice in made.choices]

    first = texts(seed=5)
    assert len(set(first)) == 3
    with ThreadPoolExecutor(4) as pool:
        assert all(again == first for again in pool.map(lambda _: texts(seed=5), range(4)))
    assert texts(seed=6) != first
    assert texts() != texts()


def test_a_chat_is_that_of_generate_chat(
    client: Any, model: ThoughtbubblesForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    answer = Chat(model, tokenizer, Decoding(20, Sampling(0))).ask(QUESTION[0]["content"]).continuation
    asked = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_completion_tokens": 20}
    made = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert (made.object, made.choices[0].message.role) == ("chat.completion", "assistant")
    assert made.choices[0].message.content == answer
    content = made.choices[0].logprobs.content
    assert b"".join(bytes(each.bytes) for each in content).decode().strip() == answer
    assert all(each.top_logprobs[0].logprob == each.logprob for each in content)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == answer
    assert chunks[-2].choices[0].finish_reason == made.choices[0].finish_reason
    assert (chunks[-1].choices, chunks[-1].usage) == ([], made.usage)
    follow = [*QUESTION, made.choices[0].message.model_dump(), {"role": "user", "content": "bread"}]
    again = client.chat.completions.create(model="tiny", messages=follow, temperature=0, max_tokens=2)
    assert again.choices[0].finish_reason == "length"


def test_models_are_listed(client: Any) -> None:
    [listed] = client.models.list()
    assert (listed.id, listed.max_model_len, listed.budget, listed.max_budget) == ("tiny", LONGEST, "2", "3")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is 'tiny' alone"):
        client.models.retrieve("a/b")


def test_bad_requests_are_openais_errors(live: ApiServer, client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is 'tiny' alone"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="96 tokens, expected at most 95") as caught:
        client.completions.create(model="tiny", prompt=[5] * 96)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="min_p: no field that is served here"):
        client.completions.create(model="tiny", prompt="a", extra_body={"min_p": 0.1})
    for path, body, status in (
        ("completions", b"{", 400),
        ("completions", b"\xff\xfe", 400),
        ("chat/completions", b"[]", 400),
        ("completions", b'{"prompt": "' + b"x" * 5_000_000 + b'"}', 413),
        ("nothing", b"{}", 404),
    ):
        refused = httpx.post(f"{live.address}/v1/{path}", content=body, timeout=60)
        assert (refused.status_code, list(refused.json())) == (status, ["error"])
        assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{live.address}/v1/completions").status_code == 405


def test_a_body_of_unknown_length_is_cut_off(live: ApiServer) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(80):
            yield b"x" * 2**16

    assert httpx.post(f"{live.address}/v1/completions", content=endless(), timeout=60).status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(live: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_SECONDS", 0.2)
    assert raw(live, "POST /v1/completions", "Content-Length: 100").startswith("HTTP/1.1 408")


def raw(live: ApiServer, first: str, *headers: str) -> str:
    """The first bytes of the answer to the head of a request whose body never comes."""
    with connected(live) as connection:
        connection.sendall(head(first, *headers))
        return connection.recv(4096).decode()


@contextmanager
def connected(live: ApiServer) -> Iterator[socket.socket]:
    host, port = live.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        yield connection


def head(first: str, *headers: str) -> bytes:
    return "\r\n".join([f"{first} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def test_keys_are_asked_for_before_a_body_is_read(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with serving(model, tokenizer, slots=1, keys=["first", "second"]) as live:
        for key in ("first", "second"):
            assert client_of(live, key).completions.create(model="tiny", prompt="a", max_tokens=1).choices
        for headers in ([], ["Authorization: Bearer wrong"], ["Authorization: Basic first"], ["Authorization: first"]):
            for path in ("completions", "models", "nothing"):
                answer = raw(live, f"POST /v1/{path}", "Content-Length: 1000", *headers)
                assert answer.startswith("HTTP/1.1 401")
                assert "www-authenticate: Bearer" in answer
        assert httpx.get(f"{live.address}/metrics").status_code == 401
        assert httpx.get(f"{live.address}/health").json() == {"status": "ok"}
        assert httpx.head(f"{live.address}/health").status_code == 200
        asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
        asked["access-control-request-headers"] = "authorization, content-type"
        allowed = httpx.options(f"{live.address}/v1/chat/completions", headers=asked)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "*")
        with pytest.raises(openai.AuthenticationError):
            client_of(live, "wrong").models.list()


def test_without_keys_only_pages_of_this_machine_may_ask(live: ApiServer) -> None:
    for origin, status in (("https://page.example", 403), ("null", 403), ("http://localhost:3000", 200)):
        asked = {"origin": origin}
        assert httpx.get(f"{live.address}/v1/models", headers=asked).status_code == status
        preflight = httpx.options(
            f"{live.address}/v1/completions", headers={**asked, "access-control-request-method": "POST"}
        )
        assert (preflight.headers.get("access-control-allow-origin") == origin) is (status == 200)


def test_metrics_count_what_was_done(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with serving(model, tokenizer, slots=2) as live:
        made = client_of(live).completions.create(model="tiny", prompt="the", max_tokens=5, n=2, temperature=0)
        httpx.post(f"{live.address}/v1/completions", content=b"{")
        text = httpx.get(f"{live.address}/metrics").text
    values = dict(re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE))
    for name, value in {
        "slots": 2,
        "running": 0,
        "generated_tokens_total": made.usage.completion_tokens,
        "streams_total": made.usage.streams,
        'answers_total{ended="finished"}': 2,
        'requests_total{path="/v1/completions",status="200"}': 1,
        'requests_total{path="/v1/completions",status="400"}': 1,
        "answer_seconds_count": 2,
        "first_token_seconds_count": 2,
    }.items():
        assert float(values[f"thoughtbubbles_{name}"]) == value, name


def a_request(**fields: Any) -> bytes:
    """Head and body of a request for completions."""
    body = json.dumps(fields).encode()
    return head("POST /v1/completions", f"Content-Length: {len(body)}") + body


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(scripted: tuple[ApiServer, ScriptedRows], stream: bool) -> None:
    live, rows = scripted
    rows.gate.clear()
    request = a_request(prompt=[5], max_tokens=90, stream=stream)
    with connected(live) as connection:
        connection.sendall(request)
        until(lambda: live.engine.running == 1)
    with connected(live) as connection:  # and one that still waits
        connection.sendall(request)
        until(lambda: live.engine.waiting == 1 or live.engine.totals.cancelled == 1)
    rows.gate.set()
    until(lambda: live.engine.totals.cancelled == 2)
    assert (live.engine.running, live.engine.waiting, live.engine.totals.finished) == (0, 0, 0)
    assert len([name for name, _ in rows.calls if name == "step"]) < 80


def test_clients_that_leave_at_any_moment_leave_nothing(live: ApiServer, client: Any) -> None:
    requests = [a_request(prompt="the river", max_tokens=40, n=2, stream=stream) for stream in (False, True)]
    before = client.completions.create(model="tiny", prompt="the river", max_tokens=4, seed=1).choices[0].text
    for number in range(24):
        sent = requests[number % 2]
        with connected(live) as connection:
            connection.sendall(sent[: len(sent) * (1 + number // 4) // 4] if number < 12 else sent)
            time.sleep(0.01 * (number % 5))
    until(lambda: live.engine.running + live.engine.waiting == 0)
    again = client.completions.create(model="tiny", prompt="the river", max_tokens=4, seed=1).choices[0].text
    assert again == before


def test_one_who_reads_slowly_holds_up_nobody(scripted: tuple[ApiServer, ScriptedRows]) -> None:
    live, _ = scripted
    request = a_request(prompt=[5], max_tokens=90, stream=True, logprobs=3)
    with connected(live) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(request)
        until(lambda: live.engine.totals.finished == 1)
        made = client_of(live).completions.create(model="tiny", prompt=[6], max_tokens=3)
        assert made.usage.completion_tokens == 3
        heard = b""
        while b"[DONE]" not in heard:
            heard += connection.recv(2**16)
    assert heard.count(b"data: ") == 92


def test_whom_there_is_no_room_for_is_told_when_to_come_again(scripted: tuple[ApiServer, ScriptedRows]) -> None:
    live, rows = scripted
    rows.gate.clear()
    patient = client_of(live, retries=5)
    with ThreadPoolExecutor(3) as pool:
        asked = {"model": "tiny", "prompt": [5], "max_tokens": 3}
        first = pool.submit(patient.completions.create, **asked)
        until(lambda: live.engine.running == 1)
        second = pool.submit(patient.completions.create, **asked)
        until(lambda: live.engine.waiting == 1)
        refused = httpx.post(f"{live.address}/v1/completions", json={"prompt": [5]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        third = pool.submit(patient.completions.create, **asked)
        time.sleep(0.1)
        rows.gate.set()
        for each in (first, second, third):
            assert each.result().usage.completion_tokens == 3
    assert httpx.post(f"{live.address}/v1/completions", json={"prompt": [5], "n": 3}).status_code == 400


def failing(message: str) -> Any:
    """A method of rows that fails."""

    def fail(*_: Any) -> Any:
        raise RuntimeError(message)

    return fail


def test_a_model_that_fails_is_an_error_whole_and_streamed(
    scripted: tuple[ApiServer, ScriptedRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, _ = scripted
    monkeypatch.setattr(ScriptedRows, "step", failing("no memory"))
    with pytest.raises(openai.InternalServerError, match="the model failed: no memory"):
        client_of(live).completions.create(model="tiny", prompt=[5], max_tokens=3)
    with pytest.raises(openai.APIError, match="the model failed: no memory"):
        list(client_of(live).completions.create(model="tiny", prompt=[5], max_tokens=3, stream=True))


def test_a_server_whose_engine_failed_is_not_healthy(
    scripted: tuple[ApiServer, ScriptedRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, _ = scripted
    monkeypatch.setattr(ScriptedRows, "end", failing("the device is lost"))
    assert httpx.get(f"{live.address}/health").status_code == 200
    for _ in range(2):
        refused = httpx.post(f"{live.address}/v1/completions", json={"prompt": [5], "max_tokens": 1}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
    unhealthy = httpx.get(f"{live.address}/health")
    assert (unhealthy.status_code, unhealthy.json()) == (503, {"status": "stopped"})


def test_the_end_of_a_server_is_not_waited_for_by_its_clients(
    model: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ScriptedRows(1)
    rows.gate.clear()
    monkeypatch.setattr(application, "make_rows", lambda *_: rows)
    monkeypatch.setattr(server, "GRACE", 1)
    with serving(model, tokenizer, slots=1) as live, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{live.address}/v1/completions", json={"prompt": [5]}, timeout=60)
        until(lambda: live.engine.running == 1)
        threading.Timer(1.5, rows.gate.set).start()
        live.close()
        with pytest.raises(httpx.HTTPError):
            asked.result().raise_for_status()


def test_the_client_of_the_guide(live: ApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = [block for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "from openai" in block]
    code = code.replace("http://127.0.0.1:8000", live.address).replace("runs/mine", "tiny")
    exec(compile(code, "serving.md", "exec"), {})
    text = capsys.readouterr().out
    assert re.search(r" 32 \d+$", text, re.MULTILINE)


def test_fields_of_the_guide_are_those_that_are_served() -> None:
    table = GUIDE.partition("| field | default | |\n")[2].partition("\n\n")[0]
    cells = " ".join(f"{row.split('|')[1]} {row.split('|')[3]}" for row in table.splitlines()[1:])
    named = set(re.findall(r"`(\w+)`", cells))
    served = {*CompletionFields.model_fields, *ChatFields.model_fields}
    assert served <= named
    assert named - served <= {"role", "content", "include_usage"}


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'thoughtbubbles[eval]'")
@pytest.mark.parametrize("most", [0, 1])
def test_lm_eval_reads_log_likelihoods(
    live: ApiServer, model: ThoughtbubblesForCausalLM, tokenizer: PreTrainedTokenizerFast, most: int
) -> None:
    """It cuts the token that it asked for from the end of a list; with none it would cut a token of the text."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    texts = [("the river", " of stone"), ("deep", " bread"), ("the", " house under the cloud")]
    contexts = [start_document(tokenizer) + encode_text(tokenizer, context) for context, _ in texts]
    rows = [ids + encode_text(tokenizer, rest) for ids, (_, rest) in zip(contexts, texts, strict=True)]
    asked = {"model": "tiny", "prompt": rows, "temperature": 0, "max_tokens": most, "logprobs": 1, "seed": 1234}
    answer = httpx.post(f"{live.address}/v1/completions", json={**asked, "echo": True}, timeout=60).json()
    if most == 0:
        for choice in answer["choices"]:
            for values in choice["logprobs"].values():
                values.append(None)
    found = LocalCompletionsAPI.parse_logprobs(answer, tokens=rows, ctxlens=list(map(len, contexts)))
    for (logprob, is_greedy), ids, context in zip(found, rows, contexts, strict=True):
        own = model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
        scores = [float(own[place - 1, ids[place]]) for place in range(len(context), len(ids))]
        assert logprob == pytest.approx(sum(scores), abs=1e-9)
        best = [int(own[place - 1].argmax()) for place in range(len(context), len(ids))]
        assert is_greedy is (best == ids[len(context) :])


def test_a_budget_above_the_limit_is_refused(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with serving(model, tokenizer, slots=1, budget="1.5", limits=Limits(budget="2")) as live:
        ask: Callable[..., Any] = client_of(live).completions.create
        low, default = (
            ask(model="tiny", prompt="the river of", temperature=0, extra_body=body).usage
            for body in ({"budget": 1}, {})
        )
        assert low.streams == low.total_tokens - 1
        assert default.streams > default.total_tokens
        with pytest.raises(openai.BadRequestError, match="budget=3: expected at most 2"):
            ask(model="tiny", prompt="a", extra_body={"budget": 3})
