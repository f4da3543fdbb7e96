"""The server: a model, its engine and its application behind one port."""

import os
import socket
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.serving.application import SLOTS, build_application, open_service
from thoughtbubbles.serving.engine import MOST_WAITING
from thoughtbubbles.serving.served import Limits
from thoughtbubbles.support.errors import InputError, RunError, os_reason
from thoughtbubbles.support.signals import stop_on_signals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["ApiServer"]

GRACE = 5
"""Seconds that answers on their way have when the server ends."""


class ApiServer:
    """A model that is served from a thread of its own, until it is closed.

    Args:
        name: by which requests call the model.
        model: in evaluation mode.
        tokenizer: its own.
        slots: answers at a time.
        host, port: where to listen; port 0 is a free one.
        keys: API keys, of which a request must have one; none is no such rule.
        budget: streams per token where a request says nothing; None is the model's own.
        limits: of requests.
        most_waiting: answers that may wait for a slot.

    Attributes:
        address: without a slash at its end.
        engine: that runs the model.

    Raises:
        InputError: FastAPI, uvicorn or prometheus-client is missing, or host or port are not to be had.
        RunError: the server does not start.
        ValueError: a budget that the model cannot have.
    """

    def __init__(
        self,
        name: str,
        model: ThoughtbubblesForCausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        slots: int = SLOTS,
        host: str = "127.0.0.1",
        port: int = 8000,
        keys: Sequence[str] = (),
        budget: Budget | None = None,
        limits: Limits | None = None,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        _check_installed()
        import uvicorn

        listener = _listen(host, port)
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        try:
            self._service = open_service(name, model, tokenizer, slots, budget, limits, most_waiting)
        except BaseException:
            listener.close()
            raise
        self.engine = self._service.engine
        config = uvicorn.Config(
            build_application(self._service, keys),
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=GRACE,
        )
        self._server = uvicorn.Server(config)
        self._thread = Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                self.close()
                raise RunError(f"serve: the server at {self.address} did not start")
            time.sleep(0.01)

    def wait(self) -> None:
        """Serve until Ctrl-C or SIGTERM, then let what is on its way end."""
        with stop_on_signals() as stop:
            while self._thread.is_alive() and not stop.requested:
                self._thread.join(0.2)
        self.close()

    def close(self) -> None:
        """End the server, and free its port."""
        self._server.should_exit = True
        self._thread.join(2 * GRACE)
        self._service.close()


def read_keys(path: Path) -> list[str]:
    """The API keys of a file, one a line.

    Raises:
        InputError: it cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: {os_reason(error)}, expected a file with an API key a line") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8: {error}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise InputError(f"{path}: expected an API key a line, and there is none")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise InputError(f"{path}: expected keys of ASCII letters, digits and signs, since a header has no others")
    return keys


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        # Of an address the library says more than one line needs; of a name there is no number.
        reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else os_reason(error)
        raise InputError(f"{host}, port {port}: {reason}: expected an address of this machine that is free") from None


def _check_installed() -> None:
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise InputError(f"serve: expected {', '.join(missing)}, which `pip install 'thoughtbubbles[serve]'` brings")
