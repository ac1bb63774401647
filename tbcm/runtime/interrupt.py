"""Ctrl-C, SIGTERM and their like as a request to stop after this step, not as a lost run."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

ALWAYS = signal.SIGINT, signal.SIGTERM
UNLESS_IGNORED = signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU
"""A closed terminal, and what batch systems send before they kill: Slurm (--signal), LSF (-wa), Grid Engine (-notify,
s_rt, s_cpu). Who has set one to be ignored means it: nohup does so with SIGHUP."""

_NOTICE = b"\nstopping after this step; press Ctrl-C again to stop at once\n"


class StopRequest:
    """Inside `with StopRequest() as stop:` the first of these signals sets `stop.stop_requested`.

    A SIGINT after that raises KeyboardInterrupt at once. A further one of the others does not: torchrun and batch
    systems repeat theirs. Main thread only, as `signal.signal` demands; the handlers found are put back at the end.
    """

    def __init__(self) -> None:
        self.stop_requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        foreign = signal.SIG_IGN, None  # None: a handler that is not Python's, such as faulthandler's
        free = [number for number in UNLESS_IGNORED if signal.getsignal(number) not in foreign]
        for number in (*ALWAYS, *free):
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
            with suppress(OSError):  # the terminal is what may have gone
                os.write(2, _NOTICE)  # not logging: the signal may have come in the middle of a buffered write
        self.stop_requested = True
