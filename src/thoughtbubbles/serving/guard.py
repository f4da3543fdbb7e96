"""What stands before the application: keys, foreign pages, sizes, and clients that leave.

It is ASGI of its own, since the middleware of frameworks that looks at requests hides from them that a client has left.
"""

import asyncio
import hmac
import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import ExitStack
from hashlib import sha256
from typing import Any

from thoughtbubbles.serving.refusals import RefusedError

MOST_BYTES = 4 * 2**20
"""Of a request's body."""
MOST_SECONDS = 60.0
"""For a body to arrive."""
LEAVING = "thoughtbubbles.leaving"
"""In a request's scope: an ExitStack that closes when it is answered or its client is gone."""
LOCAL_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?"
KNOWN_PATHS = ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")

Scope = MutableMapping[str, Any]
Incoming = Callable[[], Awaitable[Scope]]
Outgoing = Callable[[Scope], Awaitable[None]]


class Guard:
    """ASGI middleware.

    A request without a key that is known is refused before its body is read; `/health` and a browser's question what it
    may ask (OPTIONS) need none. Where there are no keys, pages of other sites are refused, which could make any browser
    on this machine use the model.

    Args:
        app: the application.
        keys: of which a request must have one; none is no such rule.
        count: is told path and status of each answer.
    """

    def __init__(self, app: Any, keys: Iterable[str], count: Callable[[str, int], None]) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in keys]
        self._count = count

    async def __call__(self, scope: Scope, receive: Incoming, send: Outgoing) -> None:
        """Answer one request, as long as its client is there."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Scope) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in KNOWN_PATHS else "other"
                self._count(path, message["status"])
            await send(message)

        try:
            self._check(scope)
            body = await _read(scope, receive)
        except RefusedError as refusal:
            await _send_refusal(refusal, counted)
            return
        if body is not None:
            await self._answer(scope, body, receive, counted)

    def _check(self, scope: Scope) -> None:
        """Refuse by the first lines of a request."""
        headers = scope["headers"]
        if self._keys:
            if scope["path"] != "/health" and scope["method"] != "OPTIONS" and not self._has_key(headers):
                message = "expected an API key that is known, as in the header Authorization: Bearer KEY"
                raise RefusedError(401, message, None, "invalid_api_key", {"www-authenticate": "Bearer"})
            return
        for origin in (value.decode("latin-1") for name, value in headers if name == b"origin"):
            if not re.fullmatch(LOCAL_ORIGIN, origin):
                message = f"Origin: {origin[:100]!r}: expected a page of this machine, since no API key is asked for"
                raise RefusedError(403, message, None, "foreign_origin")

    def _has_key(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in headers if name == b"authorization"]
        kind, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        found = _digest(key.strip())
        # Every key is compared, so that the time it takes says nothing of them.
        return kind.lower() == b"bearer" and sum(hmac.compare_digest(found, each) for each in self._keys) > 0

    async def _answer(self, scope: Scope, body: bytes, receive: Incoming, send: Outgoing) -> None:
        unread: list[Scope] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Scope:
            if not unread:
                await asyncio.Event().wait()  # whether the client leaves is asked here
            return unread.pop()

        with ExitStack() as leaving:
            answering = asyncio.ensure_future(self._app({**scope, LEAVING: leaving}, receive_again, send))
            gone = asyncio.ensure_future(_departure(receive))
            try:
                await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                was_answered = answering.done()
                answering.cancel()
                gone.cancel()
                await asyncio.gather(answering, gone, return_exceptions=True)
        if was_answered:
            answering.result()


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()


async def _departure(receive: Incoming) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(scope: Scope, receive: Incoming) -> bytes | None:
    """The whole body of a request; None if the client left.

    Raises:
        RefusedError: it is too long, or takes too long.
    """
    too_long = RefusedError(413, f"the body has more bytes than expected: at most {MOST_BYTES:,}", None, "too_large")
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    if any(value.isdigit() and int(value) > MOST_BYTES for value in lengths):
        raise too_long
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(MOST_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                more = message.get("more_body", False)
                if size > MOST_BYTES:
                    raise too_long
    except TimeoutError:
        raise RefusedError(408, f"the body: expected all of it within {MOST_SECONDS:g} seconds") from None
    return b"".join(parts)


async def _send_refusal(refusal: RefusedError, send: Outgoing) -> None:
    body = json.dumps(refusal.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
