"""OpenAI's interface over HTTP: models, completions and chats, streamed and whole."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from thoughtbubbles.model.budget import Budget, budget_text
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.serving.answers import AnswerFormat, AnswerSoFar, ChatFormat, CompletionFormat, Json
from thoughtbubbles.serving.engine import MOST_WAITING, BusyError, Engine
from thoughtbubbles.serving.guard import LEAVING, LOCAL_ORIGIN, Guard
from thoughtbubbles.serving.metrics import ServerMetrics
from thoughtbubbles.serving.orders import Failed, Finished, Order, Saying, Ticket, Written
from thoughtbubbles.serving.refusals import RefusedError
from thoughtbubbles.serving.requests import ChatFields, CompletionFields, RequestFields, read_fields
from thoughtbubbles.serving.rows import make_rows
from thoughtbubbles.serving.served import Limits, ServedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["build_application", "open_service"]

SLOTS = 16
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
Result = TypeVar("Result")


class Service:
    """Requests, answered by an engine.

    Args:
        served: the model.
        engine: that runs it.

    Attributes:
        metrics: of all that is asked.
    """

    def __init__(self, served: ServedModel, engine: Engine) -> None:
        self.served = served
        self.engine = engine
        self.metrics = ServerMetrics(engine)
        self._created = int(time.time())
        # Tokenizers are changed while they encode, so one text is encoded at a time.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def close(self) -> None:
        """End: what is not answered by now fails."""
        self.engine.close()
        self._reader.shutdown(cancel_futures=True)

    async def read(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Do what takes a while beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work, *arguments)

    def card(self) -> Json:
        """The model, as OpenAI lists models."""
        return {
            "id": self.served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "thoughtbubbles",
            "max_model_len": self.served.longest,
            "budget": budget_text(self.served.budget),
            "max_budget": budget_text(self.served.most_budget),
        }

    async def completions(self, body: bytes) -> tuple[CompletionFields, list[Order], AnswerFormat]:
        """A request to go on with texts, read."""
        fields = await self.read(read_fields, CompletionFields, body)
        orders = await self.read(self.served.completions, fields)
        return fields, orders, CompletionFormat(self.served.name, self.served.table, orders)

    async def chats(self, body: bytes) -> tuple[ChatFields, list[Order], AnswerFormat]:
        """A request for the next message of a conversation, read."""
        fields = await self.read(read_fields, ChatFields, body)
        orders = await self.read(self.served.chats, fields)
        return fields, orders, ChatFormat(self.served.name, self.served.table, orders)

    def submit(self, orders: Sequence[Order], leaving: ExitStack) -> "Answering":
        """Ask the engine; what is not done when the client leaves is dropped.

        Raises:
            RefusedError: there is no room for more.
        """
        answering = Answering(orders, self.metrics)
        try:
            self.engine.submit(answering.tickets)
        except BusyError as error:
            headers = {"retry-after": str(error.retry_after)}
            raise RefusedError(503, str(error), None, "overloaded", headers) from None
        leaving.callback(self.engine.cancel, answering.tickets)
        return answering


class Answering:
    """The answers to one request, on their way from the engine's thread to the event loop.

    Args:
        orders: of the request.
        metrics: told how long it took.

    Attributes:
        tickets: one an order.
        answers: as far as they are written.
    """

    def __init__(self, orders: Sequence[Order], metrics: ServerMetrics) -> None:
        self._loop = asyncio.get_running_loop()
        self._sayings: asyncio.Queue[tuple[int, Saying]] = asyncio.Queue()
        self._metrics, self._began = metrics, time.monotonic()
        self.tickets = [Ticket(order, self._teller(index)) for index, order in enumerate(orders)]
        self.answers = [AnswerSoFar() for _ in orders]

    def _teller(self, index: int) -> Callable[[Saying], None]:
        def say(saying: Saying) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any longer
                self._loop.call_soon_threadsafe(self._sayings.put_nowait, (index, saying))

        return say

    async def sayings(self) -> AsyncIterator[tuple[int, Written | Finished]]:
        """What there is to say of each answer, by its number, until all are finished.

        Raises:
            RefusedError: one failed.
        """
        while any(answer.finished is None for answer in self.answers):
            index, saying = await self._sayings.get()
            answer = self.answers[index]
            if isinstance(saying, Failed):
                raise RefusedError(503 if saying.again else 500, saying.message, None, "no_answer")
            if isinstance(saying, Written):
                if not answer.texts:
                    self._metrics.first_token.observe(time.monotonic() - self._began)
                answer.add(saying)
            else:
                self._metrics.answer.observe(time.monotonic() - self._began)
                answer.finished = saying
            yield index, saying

    async def whole(self, shape: AnswerFormat) -> Json:
        """All answers, when they are finished."""
        async for _ in self.sayings():
            pass
        return shape.whole(self.answers)

    async def events(self, shape: AnswerFormat, with_usage: bool) -> AsyncIterator[str]:
        """The answers as server-sent events; a failure is the last of them."""
        unused = {"usage": None} if with_usage else {}
        try:
            for chunk in shape.opening():
                yield _event({**chunk, **unused})
            async for index, saying in self.sayings():
                chunk = shape.more(index, saying) if isinstance(saying, Written) else shape.end(index, saying)
                yield _event({**chunk, **unused})
            if with_usage:
                yield _event(shape.spent(self.answers))
            yield "data: [DONE]\n\n"
        except RefusedError as error:
            yield _event(error.body())


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


def open_service(
    name: str,
    model: ThoughtbubblesForCausalLM,
    tokenizer: "PreTrainedTokenizerFast",
    slots: int = SLOTS,
    budget: Budget | None = None,
    limits: Limits | None = None,
    most_waiting: int = MOST_WAITING,
) -> Service:
    """A model ready to be asked, its engine started.

    Args:
        name: by which requests call the model.
        model: in evaluation mode.
        tokenizer: its own.
        slots: answers at a time.
        budget: streams per token where a request says nothing; None is the model's own.
        limits: of requests.
        most_waiting: answers that may wait for a slot.

    Raises:
        ValueError: a budget that the model cannot have, or above the limit.
    """
    limits = replace(limits or Limits(), answers=slots + most_waiting)
    served = ServedModel(name, model, tokenizer, budget, limits)
    engine = Engine(make_rows(model, slots, served.most_budget), served.table, most_waiting)
    engine.start()
    return Service(served, engine)


def build_application(service: Service, keys: Sequence[str] = ()) -> Any:
    """The application as ASGI.

    Args:
        service: that answers.
        keys: API keys, of which a request must have one; none is no such rule.
    """
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    app = FastAPI(title="Thoughtbubbles", docs_url=None, redoc_url=None)
    _add_facts(app, service)
    _add_answers(app, service)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(HTTPException, _lost)
    app.add_exception_handler(Exception, _broken)
    origins: Any = {"allow_origins": ["*"]} if keys else {"allow_origin_regex": LOCAL_ORIGIN}
    guarded = Guard(app, keys, service.metrics.count)
    return CORSMiddleware(guarded, allow_methods=["GET", "POST"], allow_headers=["*"], **origins)


def _add_facts(app: Any, service: Service) -> None:
    from fastapi import Response
    from fastapi.responses import JSONResponse

    @app.api_route("/health", methods=["GET", "HEAD"])  # which balancers ask by
    async def health() -> Response:
        """Whether requests are answered."""
        alive = service.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """What was asked and answered so far, for Prometheus."""
        text, kind = service.metrics.text()
        return Response(text, headers={"content-type": kind})

    @app.get("/v1/models")
    async def models() -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [service.card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """The model of that name."""
        service.served.check_name(name)
        return JSONResponse(service.card())


def _add_answers(app: Any, service: Service) -> None:
    from fastapi import Request, Response
    from fastapi.responses import JSONResponse, StreamingResponse

    async def answer(request: Request, read: Callable[[bytes], Any]) -> Response:
        fields, orders, shape = await read(await request.body())
        answering = service.submit(orders, request.scope[LEAVING])
        if not fields.stream:
            return JSONResponse(await answering.whole(shape))
        events = answering.events(shape, fields.with_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)

    @app.post("/v1/completions", openapi_extra=_body_of(CompletionFields))
    async def completions(request: Request) -> Response:
        """Go on with texts."""
        return await answer(request, service.completions)

    @app.post("/v1/chat/completions", openapi_extra=_body_of(ChatFields))
    async def chat_completions(request: Request) -> Response:
        """Write the next message of a conversation."""
        return await answer(request, service.chats)


def _body_of(kind: type[RequestFields]) -> Json:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


async def _refused(_request: Any, error: Any) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse(error.body(), error.status, dict(error.headers))


async def _lost(request: Any, error: Any) -> Any:
    """A path or a method that there is not."""
    text = f"{request.method} {request.url.path}: {error.detail}"
    return await _refused(request, RefusedError(error.status_code, text, headers=error.headers or {}))


async def _broken(request: Any, _error: Any) -> Any:
    return await _refused(request, RefusedError(500, "the server failed: its log says why"))
