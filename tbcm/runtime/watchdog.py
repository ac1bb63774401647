"""Ends a rank that hangs, and the ranks that wait for one that is gone, with the culprit's name and stack."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
import uuid
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Self

import torch.distributed as dist

from tbcm.runtime import distributed, failure, signs
from tbcm.runtime.signs import Board, Pulse, Sign

EXIT_CODE = 124  # as timeout(1)
_LONGEST_TICK = 5.0  # or a quarter of the timeout; more between ticks means that it was suspended: nobody's hang


class Watchdog:
    """Inside `with Watchdog(600):` this process ends when the run makes no progress any more.

        with Watchdog(600):
            for step in ...:
                pulse.beat(step)             # signs.pulse; before each micro-batch
                with pulse.waiting():        # only around what blocks until the other ranks come
                    dist.all_reduce(...)

    Under torchrun every rank enters it together. A rank that

    * works for `timeout` seconds without a beat shows the others the stack of its main thread, and ends `grace` / 2
      later (without other ranks: at once), logging its stack and what the others show;
    * waits for `timeout` + `grace` seconds ends if it sees who is to blame, and logs it: a rank that has ended, that is
      stuck, or that gives no sign of life (SIGSTOP, a lost host, a thread that keeps Python's lock), or all, if they
      wait for one another;
    * has had no answer from torchrun's store for `timeout` seconds (`grace`, if the connection broke: the first node is
      lost), or whose torchrun is gone, ends too.

    So a run that stands still is ended, with the reason, within `timeout` + `grace` + 10 seconds. `grace` is 30 s (half
    the timeout, if that is less). torchrun then ends the other processes of the node; one that does not react to
    SIGTERM, it kills after 30 s more. What takes long by right (compiling, a preview, staging a checkpoint) must take
    less than `timeout`. Time in which the process is suspended does not count.

    Args:
        timeout: seconds.
    """

    def __init__(self, timeout: float, pulse: Pulse = signs.pulse) -> None:
        self.timeout, self.pulse = timeout, pulse
        self.grace = min(30.0, timeout / 2)
        self.interval = min(1.0, self.grace / 5)
        self.board: Board | None = None
        self.found: list[str] = []  # what the others' signs say, kept up to date while nothing moves
        self._before: tuple[float, list[Sign]] | None = None
        self._answered, self._patience = pulse.clock, timeout  # with the store
        self._stopped = threading.Event()

    def __enter__(self) -> Self:
        self.pulse.last_words = ""
        self.pulse.beat(self.pulse.step)
        threading.Thread(target=self._watch_this_process, name="watchdog", daemon=True).start()
        if distributed.world_size() > 1:
            # A connection of its own, under a name of its own: the store may be the same after a restart.
            key = distributed.run_on_main(lambda: uuid.uuid4().hex)
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(
                address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=self.timeout)
            )
            ranks = distributed.rank(), distributed.world_size()
            board = Board(dist.PrefixStore(f"tbcm/{key}", store), *ranks, socket.gethostname(), self.interval)
            board.publish(self.pulse)
            distributed.any_rank(False)  # all have published
            self._answered = self.pulse.clock
            self.board = signs.board = board
            threading.Thread(target=self._watch_the_others, args=[board], name="signs of life", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.board is not None:
            return  # `failure.reported` ends this process, and needs the board for it
        if self.board is not None:
            self.pulse.last_words = f"it left the run after step {self.pulse.step}"
            with suppress(RuntimeError):  # torchrun may be gone before the last rank; the run is over
                self.board.publish(self.pulse)
        self._stopped.set()
        self.board = signs.board = None

    # This process: a thread that does no I/O, so that nothing can hold it up.

    def _watch_this_process(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(self.interval):
            now = time.monotonic()
            self.tick(now - before)
            before = now

    def tick(self, elapsed: float) -> None:
        """Judges this process, `elapsed` seconds after the last time."""
        pulse, me = self.pulse, failure.name()
        pulse.clock += min(elapsed, _LONGEST_TICK, self.timeout / 4)
        step, waits, seconds = pulse.state()
        if os.getppid() != pulse.parent and "TORCHELASTIC_RUN_ID" in os.environ:
            failure.end(EXIT_CODE, f"{me} ends at step {step}: the torchrun that started it is gone")
        if self.board is not None and pulse.clock - self._answered > self._patience:
            where = f"torchrun's store on {os.environ.get('MASTER_ADDR')}"
            silent = f"{where} has not answered for {self._patience:.0f} s (its node may be lost)"
            failure.end(EXIT_CODE, f"{me} ends at step {step}: {silent}")
        if waits and seconds > self.timeout + self.grace and self.found:
            why = f"{me} has waited for others at step {step} for {seconds:.0f} s, here:"
            failure.end(EXIT_CODE, why, "\n".join([_main_stack(), *self.found]))
        if not waits and seconds > self.timeout + (self.grace / 2 if self.board else 0):
            advice = "(if it may take as long as that, raise parallel.timeout_minutes)"
            detail = "\n".join([_main_stack(), *self.found, advice])
            failure.end(EXIT_CODE, f"{me} has been at step {step} for {seconds:.0f} s, here:", detail)

    # The other ranks: a thread that talks to the store.

    def _watch_the_others(self, board: Board) -> None:
        while not self._stopped.wait(self.interval):
            stuck = self.pulse.state()[2] > self.timeout
            try:
                board.publish(self.pulse, _main_stack() if stuck else "")
                self.found = self._look(board)
            except RuntimeError:  # the connection does not come back
                self._patience = self.grace
                return
            self._answered = self.pulse.clock

    def _look(self, board: Board) -> list[str]:
        """Once nothing has moved here for almost the timeout: who is to blame, from what changes on the board."""
        seconds = self.pulse.state()[2]
        if seconds < self.timeout - self.grace:
            self._before = None
            return []
        now = board.read()
        if self._before is None:
            self._before = seconds, now
        since, before = self._before
        long_enough = seconds - since > self.grace / 2  # for a rank to have given a sign, if it could
        return signs.to_blame(before, now, board.rank) if long_enough else []


def _main_stack() -> str:
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return "".join(traceback.format_stack(frame)).rstrip()
