"""Counting updates that were skipped because a loss or a gradient was not finite."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tbcm.errors import UserError
from tbcm.runtime import distributed


class NonFiniteGuard:
    """Counts skipped updates on the device and stops a run that skips too many in a row.

    `update` every step (no host sync); `check` on log steps only (one host sync). Goes into the checkpoint, but for
    the count of this rank's own losses: that says who it was, and another number of ranks could not read it.
    """

    def __init__(self, max_in_a_row: int, device: torch.device | str = "cpu") -> None:
        self.max_in_a_row = max_in_a_row
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.own_losses = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, finite: Tensor, loss: Tensor | None = None) -> None:
        """Counts an update.

        Args:
            finite: bool scalar on the device, the same on all ranks: whether the update was done.
            loss: this rank's own scalar. Gradients are shared by the time they are looked at, so that it alone can
                tell on which rank a NaN began.
        """
        skipped = (~finite).long()
        self.total += skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        if loss is not None:
            self.own_losses = (self.own_losses + (~loss.isfinite()).long()) * skipped

    def check(self, step: int, last_checkpoint: Path | None) -> None:
        """Raises UserError, on all ranks together, if the last `max_in_a_row` updates were all skipped."""
        in_a_row = int(self.in_a_row)
        if in_a_row >= self.max_in_a_row:
            good = f"last good checkpoint: {last_checkpoint}" if last_checkpoint else "no checkpoint was saved yet"
            raise UserError(
                f"loss or gradient was not finite in {in_a_row} updates in a row at step {step}{self._where()}: "
                f"lower the learning rate, or use bf16 or fp32 in place of fp16; {good}"
            )

    def _where(self) -> str:
        """On which ranks. A collective: only at the very end, when all ranks raise."""
        if not distributed.is_initialized():
            return ""
        counts: list[tuple[str, int] | None] = [None] * distributed.world_size()
        dist.all_gather_object(counts, (socket.gethostname(), int(self.own_losses)))
        named = [f"rank {rank} ({count[0]})" for rank, count in enumerate(counts) if count and count[1]]
        where = ", ".join(named) if len(named) < len(counts) else f"all {len(counts)} ranks"
        return f" (the loss: on {where or 'no rank, so it is the gradient'})"

    def state_dict(self) -> dict[str, Tensor]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.total.copy_(state["total"])
        self.in_a_row.copy_(state["in_a_row"])
