"""Signals that ask a run to save and stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from thoughtbubbles.support.errors import RunInterrupted

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")


class StopRequest:
    """Whether, and by which signal, the run was asked to stop."""

    def __init__(self) -> None:
        self.signal: str | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None


def interrupted(stop: StopRequest, step: int) -> RunInterrupted:
    """What to raise when everything is saved."""
    text = f"stopped by {stop.signal} after step {step}, saved; start again to go on"
    # A script shall not go on after Ctrl-C.
    return RunInterrupted(text, exit_code=130 if stop.signal == "SIGINT" else 0)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGUSR1 and Ctrl-C into a request to stop; a second Ctrl-C stops at once.

    Elsewhere than in the main thread, which alone receives signals, nothing is caught.
    """
    request = StopRequest()
    before: dict[int, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
