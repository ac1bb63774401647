"""What the two recipes share: a budget of minutes or steps, and the loop that spends it."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tbcm.errors import UserError

LOG_STEPS = 100
SAVE_MINUTES = 5.0


class Budget:
    """How long to train: `steps`, or `minutes` of wall clock from the first step on. Exactly one of them.

    Raises:
        UserError: neither or both are given, or it is not above 0.
    """

    def __init__(self, minutes: float | None = None, steps: int | None = None) -> None:
        if (minutes is None) == (steps is None):
            raise UserError("a training budget is either --minutes or --steps: give one of them")
        if (minutes if steps is None else steps) <= 0:  # type: ignore[operator]
            raise UserError("--minutes and --steps must be above 0")
        self.minutes, self.steps = minutes, steps
        self.start()

    def start(self) -> None:
        self._began = time.monotonic()

    def elapsed(self) -> float:
        """Minutes since `start`."""
        return (time.monotonic() - self._began) / 60

    def progress(self, step: int) -> float:
        """The share of the budget that is spent after `step` steps; 1 or more at the end."""
        if self.minutes is not None:
            return self.elapsed() / self.minutes
        assert self.steps is not None
        return step / self.steps


def add_training_arguments(parser: argparse.ArgumentParser, minutes: float) -> None:
    """--minutes (default `minutes`), --steps and --device; `budget_of` reads the first two."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--minutes", type=float, help=f"train this long (default {minutes:g})")
    group.add_argument("--steps", type=int, help="train for this many steps instead")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default: cuda where there is one, else cpu")
    parser.set_defaults(default_minutes=minutes)


def budget_of(arguments: argparse.Namespace) -> Budget:
    neither = arguments.minutes is None and arguments.steps is None
    return Budget(arguments.default_minutes if neither else arguments.minutes, arguments.steps)


def learning_rate(peak: float, step: int, progress: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, times a cosine over the budget from 1 down to 0.01."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * cosine)


class WeightAverage:
    """Exponential moving average of the parameters of `source`, held by `average`, a module of the same structure.

    The decay grows as (1 + n)/(10 + n) up to `decay`, so that the random start is forgotten at once.
    """

    def __init__(self, source: nn.Module, average: nn.Module, decay: float) -> None:
        self.source, self.average, self.decay, self.updates = source, average.requires_grad_(False).eval(), decay, 0
        self.average.load_state_dict(source.state_dict())

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.source.parameters()), 1 - decay)


def shuffled_batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless indices [batch] int64: every epoch a new order of `count`, without its incomplete last batch. Fewer than
    `batch` make one batch."""
    batch = min(batch, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch].split(batch)


def fit(
    average: WeightAverage,
    loss: Callable[[int], Tensor],
    save: Callable[[int], None],
    budget: Budget,
    *,
    peak_lr: float,
    weight_decay: float,
    warmup: int = 100,
) -> None:
    """Minimises `loss(step)` over the parameters of `average.source` with AdamW until the budget is spent.

    `save(step)` is called every few minutes and at the end, so that an early stop loses little. Prints the loss.
    """
    parameters = list(average.source.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    budget.start()
    step, saved, losses = 0, 0.0, []
    while (progress := budget.progress(step)) < 1:
        optimizer.param_groups[0]["lr"] = learning_rate(peak_lr, step, progress, warmup)
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        step += 1
        losses.append(value.detach())
        if step % LOG_STEPS == 0:
            mean = torch.stack(losses).mean().item()
            print(f"step {step}, {budget.elapsed():.1f} minutes, loss {mean:.4f}", flush=True)
            losses.clear()
        if budget.elapsed() - saved >= SAVE_MINUTES:
            save(step)
            saved = budget.elapsed()
    save(step)
