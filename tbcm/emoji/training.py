"""What the two recipes share: a budget of minutes or steps, the learning rate over it, an average of the weights."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Budget:
    """How long to train: `steps`, or `minutes` of wall clock. Exactly one of them."""

    def __init__(self, minutes: float | None = None, steps: int | None = None) -> None:
        if (minutes is None) == (steps is None):
            raise ValueError("a budget is either minutes or steps")
        self.minutes, self.steps = minutes, steps
        self.restart()

    def restart(self) -> None:
        """The clock starts now, not when the budget was made."""
        self.start = time.monotonic()

    def elapsed_minutes(self) -> float:
        return (time.monotonic() - self.start) / 60

    def progress(self, step: int) -> float:
        """Share of the budget that is used, 1 and more at its end."""
        return step / self.steps if self.steps is not None else self.elapsed_minutes() / (self.minutes or 1e-9)


def add_budget_arguments(parser: argparse.ArgumentParser, default_minutes: float) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--minutes", type=float, help=f"train this long (default {default_minutes:g})")
    group.add_argument("--steps", type=int, help="train for this many steps instead")


def learning_rate(peak: float, step: int, progress: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine over the budget down to 1 % of `peak`."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * cosine)


class WeightAverage:
    """Exponential moving average of a module's parameters. The decay grows as (1 + n)/(10 + n) up to `decay`, so that
    the random start is forgotten at once."""

    def __init__(self, module: nn.Module, average: nn.Module, decay: float) -> None:
        self.source, self.average, self.decay, self.updates = module, average.requires_grad_(False).eval(), decay, 0
        self.average.load_state_dict(module.state_dict())

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.source.parameters()), 1 - decay)


def shuffled_batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless indices [batch] int64: every epoch a new order of `count`, the incomplete last batch left out."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch].split(batch) if count >= batch else (order,)
