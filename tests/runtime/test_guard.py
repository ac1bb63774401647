from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tbcm.errors import UserError
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
