"""SIGTERM, and the first SIGINT, ask a run to stop at the end of its step; a second SIGINT breaks it off."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Which signal came, if one did."""

    def __init__(self) -> None:
        self.name: str | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: only remember, everything else happens between two steps."""
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Handlers for the length of the block; none outside of the main thread, which alone gets signals."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    earlier = {number: signal.signal(number, request.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
