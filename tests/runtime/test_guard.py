from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tbcm.errors import UserError
from tbcm.runtime import distributed
from tbcm.runtime.guard import NonFiniteGuard

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def test_counts_in_a_row_and_in_all() -> None:
    guard = NonFiniteGuard(max_in_a_row=3)
    for finite in (GOOD, BAD, BAD, GOOD, BAD, BAD):
        guard.update(finite)
        guard.check(0, None)
    assert (int(guard.total), int(guard.in_a_row)) == (4, 2)


def test_too_many_in_a_row_end_the_run_with_one_line() -> None:
    guard = NonFiniteGuard(max_in_a_row=3)
    for _ in range(5):  # checked only on log steps, so more may have come together
        guard.update(BAD)
    with pytest.raises(UserError) as caught:
        guard.check(120, Path("run/checkpoints/step-00000100"))
    assert "not finite in 5 updates in a row at step 120" in str(caught.value)
    assert "run/checkpoints/step-00000100" in str(caught.value)
    with pytest.raises(UserError, match="no checkpoint was saved yet"):
        guard.check(120, None)


def test_state_goes_into_a_checkpoint() -> None:
    guard, other = NonFiniteGuard(3), NonFiniteGuard(3)
    for finite in (BAD, GOOD, BAD, BAD):
        guard.update(finite)
    other.load_state_dict(guard.state_dict())
    other.update(BAD)
    assert (int(other.total), int(other.in_a_row)) == (4, 3)
    assert int(guard.total) == 3


def test_a_process_alone_names_no_rank() -> None:
    guard = NonFiniteGuard(max_in_a_row=1)
    guard.update(BAD, torch.tensor(float("nan")))
    with pytest.raises(UserError) as caught:
        guard.check(7, None)
    assert "rank" not in str(caught.value)


@pytest.mark.parametrize(
    ("counts", "where"),
    [
        ([("a", 2), ("b", 0), ("b", 1)], "rank 0 (a), rank 2 (b)"),
        ([("a", 0), ("b", 0), ("b", 0)], "no rank, so it is the gradient"),
        ([("a", 2), ("b", 2), ("b", 2)], "all 3 ranks"),
    ],
)
def test_the_ranks_whose_loss_was_not_finite_are_named(
    counts: list[tuple[str, int]], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(found: list[Any], own: tuple[str, int]) -> None:
        assert own == (socket.gethostname(), 2)
        found[:] = counts

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    guard = NonFiniteGuard(max_in_a_row=3)
    # Only what came in this row of skipped updates counts, and of it only what was this rank's own.
    for finite, loss in ((BAD, math.nan), (GOOD, 1.0), (BAD, math.inf), (BAD, 1.0), (BAD, math.nan)):
        guard.update(finite, torch.tensor(loss))
    with pytest.raises(UserError) as caught:
        guard.check(9, None)
    assert f"in 3 updates in a row at step 9 (the loss: on {where}): lower" in str(caught.value)
