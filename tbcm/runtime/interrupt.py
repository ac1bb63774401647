"""Ctrl-C and SIGTERM as a request to stop after this step, not as a lost run."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

_NOTICE = b"\nstopping after this step; press Ctrl-C again to stop at once\n"


class StopRequest:
    """Inside `with StopRequest() as stop:` the first SIGINT or SIGTERM sets `stop.stop_requested`.

    A SIGINT after that raises KeyboardInterrupt at once. A further SIGTERM does not: torchrun and batch systems repeat
    theirs. Main thread only, as `signal.signal` demands; the handlers found are put back at the end.
    """

    def __init__(self) -> None:
        self.stop_requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.stop_requested:
            os.write(2, _NOTICE)  # not logging: the signal may have come in the middle of a buffered write
        self.stop_requested = True
