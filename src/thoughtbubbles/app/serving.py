"""A page of gradio's behind the shield, on this machine alone."""

import logging
import os
import socket
import time
from threading import Thread
from typing import TYPE_CHECKING, Any

from thoughtbubbles.app.shield import Shield
from thoughtbubbles.support.errors import InputError, RunError

if TYPE_CHECKING:
    from gradio import Blocks

ADDRESS = "127.0.0.1"
PORTS = range(7860, 7960)


class PageServer:
    """A page that is served from a thread of its own, until it is closed.

    Args:
        page: of gradio's.
        port: None is the first free one of `PORTS`.
        look: theme and css, as gradio takes them.

    Attributes:
        address: of the page, with a slash at its end.

    Raises:
        InputError: the port is taken.
        RunError: the server does not start.
    """

    def __init__(self, page: "Blocks", port: int | None = None, **look: Any) -> None:
        import uvicorn

        listener = _listen(port)
        self.address = f"http://{ADDRESS}:{listener.getsockname()[1]}/"
        self._page = page
        config = uvicorn.Config(
            Shield(_application(page, look)),
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RunError(f"demo: the server at {self.address} did not start")
            time.sleep(0.01)

    def wait(self) -> None:
        """Serve until the user ends it with Ctrl-C."""
        try:
            while self._thread.is_alive():
                self._thread.join(0.2)
        except KeyboardInterrupt:
            self.close()

    def close(self) -> None:
        """End the server, and free its port."""
        self._page.close(verbose=False)
        # What the end cuts short is no error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._server.should_exit = True
        self._thread.join(10)


def _listen(port: int | None) -> socket.socket:
    for each in PORTS if port is None else (port,):
        try:
            return socket.create_server((ADDRESS, each))
        except OSError:
            continue
    raise InputError(f"port {port or f'{PORTS[0]} to {PORTS[-1]}'}: expected one that is free")


def _application(page: "Blocks", look: dict[str, Any]) -> Any:
    import gradio
    from fastapi import FastAPI

    outer = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    gradio.mount_gradio_app(
        outer,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        blocked_paths=[os.sep],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        **look,
    )
    # As `launch` would have it: closing the page ends its open connections through it.
    mounted: Any = outer.routes[-1]
    page.app = page.server_app = mounted.app
    return outer
