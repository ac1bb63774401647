"""The continuous-time consistency objective: r schedule, direction of the derivative, weighting (paper Eq. 2-4).

The tangent g (Eq. 4) and the weighted loss are fused operators, `tbcm_kernels.tangent` and `.consistency_loss`, which
hold their formulas; `tbcm.method.tbcm` puts all together (Algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tbcm_kernels.consistency_loss import time_weight
from torch import Tensor

from tbcm.method.trigflow import per_sample


@dataclass(frozen=True)
class RSchedule:
    """The stability factor r (paper Sec. 4.3, Tab. 6-7): warm-up, then cool-down to `final`.

    r = min(1, step / warmup), then p = clip((step - cooldown_start) / cooldown_steps, 0, 1), r <- (1 - p) r + p final.
    With cooldown_start None it is the other scheme of Tab. 7: a warm-up straight to `final`.
    """

    warmup_steps: int
    final: float
    cooldown_start: int | None
    cooldown_steps: int = 0

    def __call__(self, step: int) -> float:
        r = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        if self.cooldown_start is None:
            return self.final * r
        p = (
            (step - self.cooldown_start) / self.cooldown_steps
            if self.cooldown_steps
            else float(step >= self.cooldown_start)
        )
        p = min(max(p, 0.0), 1.0)
        return (1 - p) * r + p * self.final


def network_tangents(dxdt: Tensor, t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """The direction of the JVP, (cos t sin t dx/dt / sigma_d, cos t sin t), for which dF is cos t sin t dF/dt.

    The factor bounds the derivative near t = pi/2, where dF/dt alone is large (sCM's tangent rearrangement).
    """
    cs = torch.cos(t) * torch.sin(t)
    return per_sample(cs, dxdt) * dxdt / sigma_data, cs


def logvar_prior(t: Tensor, dim: int, sigma_data: float) -> Tensor:
    """Where the learned log-variance starts: log(w(t) / D), its optimum for a tangent of norm 1.

    The loss term w e^{-logvar} / D ||g||^2 + logvar is least at logvar = log(w ||g||^2 / D), and a normalised tangent
    has a norm just below 1. Until a head that starts at zero has learnt this offset of -2 to -10, small t outweigh all
    others and the head's gradient drives the time embedding that it shares with the network. Which of the two does the
    harm was not separated; on an earlier stand-in the student was ruined within 100 steps, and with this start is not.
    """
    return torch.log(time_weight(t, sigma_data).clamp(min=1e-6) / dim)
