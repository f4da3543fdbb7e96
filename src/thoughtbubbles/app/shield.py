"""What the demo page refuses: files of the machine, uploads, other sites."""

from typing import Any

# Parts of gradio's server that read or write files, or fetch from elsewhere; the page needs none of them.
REFUSED = ("file", "upload", "proxy", "stream/", "component_server", "custom_component", "run-history", "monitoring")
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'none'"
)


class Shield:
    """ASGI middleware: refuses what the page does not need, and tells the browser to load from here alone."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
            await send(message)

        if scope["type"] == "http" and is_refused(scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"not part of this page\n"})
        else:
            await self.app(scope, receive, send_with_policy)


def is_refused(path: str) -> bool:
    """Whether a path of the server is one that the page does not need."""
    rest = path.lstrip("/").removeprefix("gradio_api/").lstrip("/")
    return rest.startswith(REFUSED)
