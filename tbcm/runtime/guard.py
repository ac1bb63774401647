"""Counting updates that were skipped because a gradient was not finite."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tbcm.errors import UserError


class NonFiniteGuard:
    """Counts skipped updates on the device and stops a run that skips too many in a row.

    `update` every step (no host sync); `check` on log steps only (one host sync). Goes into the checkpoint.
    """

    def __init__(self, max_in_a_row: int, device: torch.device | str = "cpu") -> None:
        self.max_in_a_row = max_in_a_row
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, finite: Tensor) -> None:
        """`finite`: bool scalar on the device, from `optimizer.clip_and_check`."""
        skipped = (~finite).long()
        self.total += skipped
        self.in_a_row = (self.in_a_row + 1) * skipped

    def check(self, step: int, last_checkpoint: Path | None) -> None:
        """Raises UserError if the last `max_in_a_row` updates were all skipped."""
        in_a_row = int(self.in_a_row)
        if in_a_row >= self.max_in_a_row:
            good = f"last good checkpoint: {last_checkpoint}" if last_checkpoint else "no checkpoint was saved yet"
            raise UserError(
                f"loss or gradient was not finite in {in_a_row} updates in a row at step {step}: "
                f"lower the learning rate, or use bf16 or fp32 in place of fp16; {good}"
            )

    def state_dict(self) -> dict[str, Tensor]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.total.copy_(state["total"])
        self.in_a_row.copy_(state["in_a_row"])
