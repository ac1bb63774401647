"""Signs of life: what this process is doing, and a board in torchrun's store on which every rank reads it of all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported before anything heavy is, so that a bad command line is refused at once
    from torch.distributed import Store


class Pulse:
    """What the main thread is doing. It only notes it (no clock, no lock, no I/O); the watchdog judges.

    `clock` is the time in seconds that the watchdog has seen pass: a process that was suspended has not aged. `parent`
    is the process that started this one.
    """

    def __init__(self) -> None:
        self.clock = 0.0
        self.last_words = ""
        self.parent = os.getppid()
        self._now = (0, False, 0.0)  # assigned as a whole: another thread reads it

    def beat(self, step: int) -> None:
        """The main thread makes progress, in step `step`."""
        self._now = step, False, self.clock

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the main thread only waits for other ranks: were it too long, it would be another's fault."""
        step = self.step
        self._now = step, True, self.clock
        try:
            yield
        finally:
            self._now = step, False, self.clock

    def state(self) -> tuple[int, bool, float]:
        """The step, whether it waits for other ranks, and for how many seconds it has done what it does."""
        step, waits, since = self._now
        return step, waits, self.clock - since

    @property
    def step(self) -> int:
        return self._now[0]


@dataclass(frozen=True)
class Sign:
    """What a rank last said of itself; `count` grows with each sign."""

    rank: int
    host: str
    count: int
    step: int
    waits: bool
    seconds: float
    last_words: str
    stack: str  # of a main thread that is stuck, else empty

    def __str__(self) -> str:
        doing = "waiting for the others" if self.waits else "working"
        return f"rank {self.rank} ({self.host}): {doing} at step {self.step} for {self.seconds:.0f} s"


class Board:
    """The signs of all ranks. Methods raise RuntimeError where the store is gone, and block where its host is.

    Args:
        interval: seconds between a rank's signs.
    """

    def __init__(self, store: Store, rank: int, world_size: int, host: str, interval: float) -> None:
        self._store, self._host = store, host
        self.rank, self.world_size, self.interval = rank, world_size, interval
        self._count = 0

    def publish(self, pulse: Pulse, stack: str = "") -> None:
        self._count += 1
        sign = Sign(self.rank, self._host, self._count, *pulse.state(), pulse.last_words, stack)
        self._store.set(str(self.rank), json.dumps(asdict(sign)))
        self._store.check([str(self.rank)])  # `set` does not wait for the store's answer

    def read(self) -> list[Sign]:
        """Of every rank; each must have published once."""
        return [Sign(**json.loads(text)) for text in self._store.multi_get([str(r) for r in range(self.world_size)])]


def gone(before: Sequence[Sign], now: Sequence[Sign], me: int) -> list[str]:
    """Which ranks other than `me` have ended or fallen silent between two readings of the board, and what they said."""
    found = []
    for old, new in zip(before, now, strict=True):
        if new.rank == me:
            continue
        if new.last_words:
            found.append(f"rank {new.rank} ({new.host}) has ended, saying: {new.last_words}")
        elif new.count == old.count:
            found.append(f"no sign of life any more (killed, frozen or cut off) from {new}, when last heard")
    return found


def to_blame(before: Sequence[Sign], now: Sequence[Sign], me: int) -> list[str]:
    """Why nothing moves, as lines; none if another rank still works.

    A rank that is stuck in an operator and one that waits there for it look the same: so the stacks of all are shown,
    those that most have in common last.
    """
    found = gone(before, now, me)
    stuck = [sign for sign in now if sign.stack]
    if len(stuck) == len(now) and all(sign.waits for sign in now):
        found.append("all ranks wait for one another: the network between them fails, or they wait in different places")
    if found or any(not sign.waits for sign in stuck):
        alike: dict[str, list[str]] = {}
        for sign in stuck:
            if sign.rank != me:
                alike.setdefault(sign.stack, []).append(str(sign))
        found += [f"{'; '.join(names)}\n{stack}" for stack, names in sorted(alike.items(), key=lambda a: len(a[1]))]
    return found


pulse = Pulse()
"""This process's."""

board: Board | None = None
"""While a `Watchdog` runs with other ranks."""
