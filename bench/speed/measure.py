"""One arm under measurement: its trainer, the time of its steps and of their phases, its FLOPs and its memory."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tbcm_kernels import dispatch

from speed import arms
from tbcm.config import Config
from tbcm.runtime.phases import PhaseTimer
from tbcm.runtime.spread import spread
from tbcm.setup.parts import Parts
from tbcm.training.random_parts import random_parts
from tbcm.training.trainer import Trainer

WARM_UP = 3
PHASES = "text", "vae", "latents", "teacher", "forward", "backward", "discriminator", "optimizer"


class Measured:
    """An arm ready to take steps. Raises torch.OutOfMemoryError where it does not fit."""

    def __init__(self, name: str, config: Config, device: torch.device) -> None:
        self.name, self.config, self.device = name, config, device
        self.without = arms.without(name)
        self.trainer = Trainer(config, device, parts(config, device))
        self.seconds: list[float] = []
        self.in_a_row: float | None = None
        self.phases: list[dict[str, float]] = []

    def step(self) -> None:
        """A step and its time."""
        self._synchronise()
        started = time.perf_counter()
        self._take()
        self._synchronise()
        self.seconds.append(time.perf_counter() - started)

    def steps_in_a_row(self, count: int) -> None:
        """Mean time of steps between which nobody waits, as in training."""
        self._synchronise()
        started = time.perf_counter()
        for _ in range(count):
            self._take()
        self._synchronise()
        self.in_a_row = (time.perf_counter() - started) / count

    def step_by_phase(self) -> None:
        with PhaseTimer(self.device) as timer:
            self._take()
        self.phases.append(dict(timer.seconds))

    def _take(self) -> None:
        with dispatch.without(*self.without):
            self.trainer.train_step()

    def warm_up(self) -> None:
        """Compiles, captures, fills caches; then memory is counted anew."""
        for _ in range(WARM_UP):
            self._take()
        self._synchronise()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def row(self, flops: int | None) -> dict[str, Any]:
        """The figures of the steps taken; `flops` of one (None: nobody has counted them)."""
        median, p20, p80 = spread(self.seconds)
        by_phase = {
            name: 1000 * statistics.median(step.get(name, 0.0) for step in self.phases)
            for name in PHASES
            if any(name in step for step in self.phases)
        }
        return {
            "arm": self.name,
            "method": self.config.method.name,
            "samples": self.trainer.method.samples_per_step,
            "points": self.config.method.points,
            "steps": len(self.seconds),
            "median_ms": 1000 * median,
            "p20_ms": 1000 * p20,
            "p80_ms": 1000 * p80,
            "in_a_row_ms": None if self.in_a_row is None else 1000 * self.in_a_row,
            "samples_per_s": self.trainer.method.samples_per_step / median,
            **({} if flops is None else {"tflop": flops / 1e12, "tflop_per_s": flops / 1e12 / median}),
            **{f"{name}_ms": value for name, value in by_phase.items()},
            **self._memory(),
        }

    def _memory(self) -> dict[str, Any]:
        if self.device.type != "cuda":
            return {"peak_gib": None, "reserved_gib": None}
        return {
            "peak_gib": torch.cuda.max_memory_allocated(self.device) / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved(self.device) / 2**30,
        }

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def parts(config: Config, device: torch.device) -> Parts:
    torch.manual_seed(0)
    return random_parts(config, device)


@contextmanager
def freed(device: torch.device) -> Iterator[None]:
    """Gives memory back afterwards, also that of an arm that did not fit."""
    try:
        yield
    finally:
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def quiet() -> None:
    logging.getLogger("tbcm").setLevel(logging.WARNING)
