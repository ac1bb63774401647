"""Named phases of a step: seen in profiles, and measured by whoever listens."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch.profiler import record_function


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Marks what runs inside as phase `name` of a step."""
    timer = PhaseTimer.active
    with record_function(f"tbcm.{name}"):
        if timer is None:
            yield
            return
        started = timer.now()
        yield
        timer.seconds[name] += timer.now() - started


class PhaseTimer:
    """While entered, `seconds` adds up the time of each phase. It waits for the device at their borders, so a step that
    is measured this way is a little slower than one that is not."""

    active: ClassVar[PhaseTimer | None] = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> PhaseTimer:
        PhaseTimer.active = self
        return self

    def __exit__(self, *_: object) -> None:
        PhaseTimer.active = None
