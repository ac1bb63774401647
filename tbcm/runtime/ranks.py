"""Collectives of a few objects among all ranks or some, from the training or from work that goes on beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from tbcm.errors import UserError, first_line
from tbcm.runtime.signs import pulse

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Who works on something together, seen from one of them. `Ranks()` is a process by itself."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    """None: the default group."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_main(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0 and returns its result on every rank (it must pickle).

        An error on rank 0 is raised on every rank: were it raised on rank 0 alone, the others would wait for ever.

        Raises:
            UserError: another rank has died, or kept silent for the group's timeout. And what `function` raises.
        """
        if self.world == 1:
            return function()
        outcome = [_outcome(function) if self.is_main else None]
        with explain_lost_ranks():
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        return _result(outcome[0])

    def on_each(self, function: Callable[[], T]) -> list[T]:
        """Calls `function` on every rank and returns all results, in the ranks' order, on every rank.

        Raises:
            UserError: as `on_main`. And what `function` raises on any rank.
        """
        if self.world == 1:
            return [function()]
        outcomes: list[Any] = [None] * self.world
        with explain_lost_ranks():
            dist.all_gather_object(outcomes, _outcome(function), group=self.group)
        return [_result(outcome) for outcome in outcomes]


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _result(outcome: Any) -> Any:
    result, error = outcome
    if error is not None:
        raise error
    return result


@contextmanager
def explain_lost_ranks() -> Iterator[None]:
    """Turns what gloo raises inside, when another rank is gone or silent for too long, into a `UserError`."""
    main = threading.current_thread() is threading.main_thread()  # whose pulse it is
    try:
        with pulse.waiting() if main else nullcontext():
            yield
    except RuntimeError as error:
        why = first_line(error)
        raise UserError(f"another rank has died or does not answer: its own log says why ({why})") from error
