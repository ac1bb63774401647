"""What the two recipes share: an averaged model, and a training loop that goes on where it was interrupted."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tbcm.errors import UserError
from tbcm.runtime.files import atomic_path

LOG_STEPS = 100
SAVE_MINUTES = 3.0
EXPORT_MINUTES = 10.0


@dataclass(frozen=True)
class Budget:
    """How long to train: up to `steps` in all calls together, or for `minutes` of this call; with neither, until one
    stops it. Then for `cooldown` further steps, in which the learning rate falls to zero. `rate` times the recipe's
    learning rate.

    Raises:
        UserError: a number is not above 0 (for `cooldown`: is below 0).
    """

    steps: int | None = None
    minutes: float | None = None
    cooldown: int = 0
    rate: float = 1.0

    def __post_init__(self) -> None:
        if (
            any(limit is not None and limit <= 0 for limit in (self.steps, self.minutes, self.rate))
            or self.cooldown < 0
        ):
            raise UserError("--steps, --minutes and --rate must be above 0, --cooldown-steps at least 0")

    def spent(self, step: int, minutes: float) -> bool:
        """Whether the part before the cooldown is over."""
        return (self.steps is not None and step >= self.steps) or (self.minutes is not None and minutes >= self.minutes)

    def done(self, step: int) -> bool:
        """Whether earlier calls have trained for `steps` and cooled down, too."""
        return self.steps is not None and step >= self.steps + self.cooldown


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """--steps, --minutes, --cooldown-steps, --rate and --device; `budget_of` reads all but the last."""
    parser.add_argument("--steps", type=int, help="train up to this many steps, those of earlier calls included")
    parser.add_argument("--minutes", type=float, help="train for this long (default: until you stop it)")
    parser.add_argument(
        "--cooldown-steps", type=int, default=0, help="then let the learning rate fall to zero over so many steps"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="times the recipe's learning rate (default: 1)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default: cuda where there is one, else cpu")


def budget_of(arguments: argparse.Namespace) -> Budget:
    return Budget(arguments.steps, arguments.minutes, arguments.cooldown_steps, arguments.rate)


@dataclass(frozen=True)
class Rate:
    """The learning rate: up to `peak` in `warmup` steps, then constant, so that nobody has to know the end; in a
    cooldown of n steps it falls linearly to zero."""

    peak: float
    warmup: int = 100

    def __call__(self, step: int, cooling: tuple[int, int] | None = None) -> float:
        """The rate of step `step` (from 0 on); `cooling`: the step at which the cooldown began, and its length."""
        rate = self.peak * min(1.0, (step + 1) / self.warmup)
        if cooling is not None:
            began, length = cooling
            rate *= max(0.0, 1 - (step - began) / length)
        return rate


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


class Training:
    """AdamW on an averaged model, with all that a checkpoint needs to go on: weights, average, moments, step, the
    cooldown if one has begun, and the state of the generator that batches are drawn from."""

    def __init__(
        self, average: WeightAverage, rate: Rate, weight_decay: float, generator: torch.Generator, checkpoint: Path
    ) -> None:
        self.average, self.rate, self.generator, self.checkpoint = average, rate, generator, checkpoint
        self.parameters = list(average.source.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rate.peak, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        self.step = 0
        self.cooling: tuple[int, int] | None = None
        self.losses: list[Tensor] = []
        self.recent_loss = float("nan")  # mean over the last LOG_STEPS
        if checkpoint.is_file():
            self._load()

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.average.source.state_dict(),
            "average": self.average.average.state_dict(),
            "updates": self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "cooling": self.cooling,
            "generator": self.generator.get_state(),
            "recent_loss": self.recent_loss,
        }

    def _load(self) -> None:
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.average.source.load_state_dict(state["model"])
            self.average.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:
            raise UserError(
                f"{self.checkpoint} is no checkpoint of this training ({type(error).__name__}); move it away"
            ) from error
        self.average.updates, self.step, self.cooling = state["updates"], state["step"], state["cooling"]
        self.generator.set_state(state["generator"])
        self.recent_loss = state["recent_loss"]
        print(f"goes on from step {self.step} ({self.checkpoint})", flush=True)

    def save(self) -> None:
        """Writes the checkpoint; a reader never sees half of it."""
        with atomic_path(self.checkpoint) as temporary:
            torch.save(self._state(), temporary)

    def take_step(self, loss: Tensor) -> None:
        """Descends along the gradient of `loss`."""
        self.optimizer.param_groups[0]["lr"] = self.rate(self.step, self.cooling)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        self.step += 1
        self.losses.append(loss.detach())

    def fit(self, loss: Callable[[], Tensor], export: Callable[[int], None], budget: Budget) -> None:
        """Minimises `loss()` until the budget is spent. Every few minutes the checkpoint is written and, less often,
        `export(step)` called; both at the end. Prints the loss."""
        began = saved = exported = time.monotonic()
        while not self._over(budget, (time.monotonic() - began) / 60):
            self.take_step(loss())
            if self.step % LOG_STEPS == 0:
                self.recent_loss = torch.stack(self.losses).mean().item()
                self.losses.clear()
                minutes = (time.monotonic() - began) / 60
                print(f"step {self.step}, {minutes:.1f} minutes, loss {self.recent_loss:.4f}", flush=True)
            if time.monotonic() - saved >= 60 * SAVE_MINUTES:
                self.save()
                saved = time.monotonic()
            if time.monotonic() - exported >= 60 * EXPORT_MINUTES:
                export(self.step)
                exported = time.monotonic()
        self.cooling = None
        self.save()
        export(self.step)

    def _over(self, budget: Budget, minutes: float) -> bool:
        if self.cooling is None and budget.spent(self.step, minutes):
            if budget.done(self.step) or not budget.cooldown:
                return True
            self.cooling = (self.step, budget.cooldown)
        return self.cooling is not None and self.step >= sum(self.cooling)
