"""What a training step reports: sums on the device, read together on log steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 8
"""Of t, equal parts of [0, pi/2]."""


class StepStatistics:
    """Means over the samples since the last `summary`, overall and by t; no host synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._loss = torch.zeros((), device=self.device)
        self._steps = 0

    def add(self, figures: dict[str, Tensor]) -> None:
        """Per-sample figures [B] as `tbcm_loss` returns them. Dropped samples count for `kept` only."""
        keep = figures["keep"].float()
        bins = (figures["t"] * (BINS / (math.pi / 2))).long().clamp(0, BINS - 1)
        one_hot = (bins[:, None] == torch.arange(BINS, device=bins.device)).float() * keep[:, None]
        self._sum("samples", torch.ones_like(keep).sum())
        self._sum("kept", keep.sum())
        self._sum("per_bin", one_hot.sum(0))
        for name in ("error", "g_norm", "logvar"):
            values = torch.where(figures["keep"], figures[name], 0.0)
            self._sum(name, values.sum())
            self._sum(f"{name}_bins", values @ one_hot)

    def add_loss(self, loss: Tensor) -> None:
        """The whole step's loss (this rank's part of it)."""
        self._loss = self._loss + loss
        self._steps += 1

    def _sum(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def summary(self) -> dict[str, Tensor]:
        """Scalars on the device. `loss` is weighted as optimised, `error` is not: ||F - sg(F) - g||^2 / D."""
        s = self._sums
        kept = s["kept"].clamp(min=1)
        out = {
            "loss": self._loss / max(self._steps, 1),
            "error": s["error"] / kept,
            "g_norm": s["g_norm"] / kept,
            "logvar": s["logvar"] / kept,
            "kept": s["kept"] / s["samples"],
        }
        per_bin = s["per_bin"]
        for name in ("error", "logvar"):
            by_t = s[f"{name}_bins"] / per_bin.clamp(min=1)
            out |= {f"{name}_by_t/{i}": by_t[i] for i in range(BINS)}
        return out
