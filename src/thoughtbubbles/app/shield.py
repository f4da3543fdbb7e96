"""What the demo page answers: its own requests, from a browser that is at this machine, and nothing else."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

READ, WRITE = ("GET", "HEAD"), ("POST",)
# gradio's server has many more: they read and write files, record, fetch from elsewhere, or change its code.
ROUTES = (
    (re.compile(r"/(favicon\.ico|manifest\.json|theme\.css)?"), READ),
    (re.compile(r"/(assets|static/(fonts|img|js))(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+"), READ),
    (re.compile(r"/gradio_api/(app_id|queue/data|heartbeat/[a-z0-9]+)"), READ),
    (re.compile(r"/gradio_api/queue/join"), WRITE),
)
MOST_BYTES = 2**20  # of a request's body
MOST_DROPPED = 16 * MOST_BYTES  # read of a body that is too long, so that the answer reaches who sends it
MOST_SECONDS = 10.0  # for a body to arrive
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
)


@dataclass(frozen=True)
class Refusal:
    """Why a request is not answered: an HTTP status, one line, and what the answer's header adds."""

    status: int
    detail: str
    headers: Mapping[str, str] | None = None


class Shield:
    """ASGI middleware, the outermost: hands on what the page needs and tells the browser to load from here alone."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request; the page has no websockets."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        refusal = refuse(scope["method"], scope["path"], scope["headers"])
        body, too_much = await _read(receive)
        if refusal := refusal or too_much:
            await _send_refusal(refusal, send)
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        # What a proxy would say of the address: there is none, and gradio would believe it.
        headers = [(name, value) for name, value in scope["headers"] if not name.startswith(b"x-forwarded-")]
        await self.app({**scope, "headers": headers}, receive_again, send_with_headers)


def refuse(method: str, path: str, headers: list[tuple[bytes, bytes]]) -> Refusal | None:
    """Why a request is refused by its first lines; None for one that the page needs.

    A page elsewhere can have its name resolve to this machine, but its Host gives it away; and what it sends to a
    name of this machine carries its Origin. The port of the Host is free, as it may be forwarded.

    Args:
        method: in capitals.
        path: decoded.
        headers: names in small letters.
    """

    def values(name: bytes) -> list[str]:
        return [value.decode("latin-1").strip() for key, value in headers if key == name]

    hosts, origins = [_authority(host) for host in values(b"host")], values(b"origin")
    if len(hosts) != 1 or hosts[0] is None:
        return Refusal(403, "Host: expected a name of this machine, such as localhost")
    same = [origin.lower().startswith("http://") and _authority(origin[7:]) == hosts[0] for origin in origins]
    if not all(same) or len(same) > 1 or (not same and method not in READ):
        return Refusal(403, "Origin: expected this page's own")
    if path != "/" and not {site.lower() for site in values(b"sec-fetch-site")} <= {"same-origin", "none"}:
        return Refusal(403, "Sec-Fetch-Site: expected same-origin")
    allowed = next((methods for route, methods in ROUTES if route.fullmatch(path)), None)
    if allowed is None:
        return Refusal(403, "not part of this page")
    if method not in allowed:
        return Refusal(405, f"method {method}: expected {' or '.join(allowed)}", {"allow": ", ".join(allowed)})
    return None


def _authority(text: str) -> tuple[str, int] | None:
    """Name and port of `name:port` where the name is this machine's own; None where it is not."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+?)\.?(?::([0-9]{1,5}))?", text.lower())
    if found is None:
        return None
    name, port = found[1].strip("[]"), int(found[2] or 80)
    try:
        own = name == "localhost" or (ip_address(name).is_loopback and found[1].startswith("[") == (":" in name))
    except ValueError:
        own = False
    return (name, port) if own and 0 < port < 2**16 else None


async def _read(receive: Receive) -> tuple[bytes, Refusal | None]:
    """The whole body of a request, or why it is not taken; no more than the limit of it is ever held."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(MOST_SECONDS):
            more = True
            while more and size <= MOST_DROPPED:
                message = await receive()
                part = message.get("body", b"")
                size += len(part)
                if size <= MOST_BYTES:
                    parts.append(part)
                more = message.get("more_body", False)
    except TimeoutError:
        return b"", Refusal(408, f"body: expected all of it within {MOST_SECONDS:g} seconds")
    if size > MOST_BYTES:
        return b"", Refusal(413, f"body: expected at most {MOST_BYTES:,} bytes")
    return b"".join(parts), None


async def _send_refusal(refusal: Refusal, send: Send) -> None:
    # As gradio's own errors look, which its page shows.
    body = json.dumps({"detail": refusal.detail}).encode()
    headers = {"content-type": "application/json", "connection": "close", **(refusal.headers or {})}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": refusal.status, "headers": [*encoded, length, *HEADERS]})
    await send({"type": "http.response.body", "body": body})
