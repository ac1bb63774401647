"""The continuous-time consistency objective: tangent, r schedule, weighting, loss (paper Eq. 2-4, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


def tangent(
    F: Tensor, dF: Tensor, x: Tensor, dxdt: Tensor, t: Tensor, r: float, sigma_data: float, c: float = 0.1
) -> tuple[Tensor, Tensor]:
    """The normalised tangent g [B, C, H, W] and its norm [B] before normalisation (paper Eq. 4, Algorithm 1).

        g = -cos^2(t) (sigma_d F - dx/dt) - r (cos t sin t x_t + sigma_d dF),    g <- g / (||g|| + c)

    `F` is the student's own prediction, detached; `dF` = cos t sin t dF/dt; the norm is over C, H, W. All fp32.
    """
    t = per_sample(t, x)
    cos, sin = torch.cos(t), torch.sin(t)
    g = -(cos**2) * (sigma_data * F - dxdt) - r * (cos * sin * x + sigma_data * dF)
    norm = torch.linalg.vector_norm(g, dim=(1, 2, 3))
    return g / (per_sample(norm, g) + c), norm


def time_weight(t: Tensor, sigma_data: float) -> Tensor:
    """w(t) = 1 / (sigma_d tan t), the prior weighting of sCM. In fp32 pi/2 rounds up: 0 there, not a little below."""
    return torch.cos(t).clamp(min=0.0) / (sigma_data * torch.sin(t))


def logvar_prior(t: Tensor, dim: int, sigma_data: float) -> Tensor:
    """Where the learned log-variance starts: log(w(t) / D), its optimum for a tangent of norm 1.

    The loss term w e^{-logvar} / D ||g||^2 + logvar is least at logvar = log(w ||g||^2 / D), and a normalised tangent
    has a norm just below 1. Until a head that starts at zero has learnt this offset of -2 to -10, small t outweigh all
    others and the head's gradient drives the time embedding that it shares with the network. Which of the two does the
    harm was not separated; on the emoji teacher the student was ruined within 100 steps, and with this start is not.
    """
    return torch.log(time_weight(t, sigma_data).clamp(min=1e-6) / dim)


def consistency_loss(
    F: Tensor, g: Tensor, logvar: Tensor, t: Tensor, keep: Tensor, count: int, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """The masked, adaptively weighted loss, and each sample's unweighted error [B] (detached).

        sum over the batch of keep (w(t) e^{-logvar} / D ||F - sg(F) - g||^2 + logvar) / count,    D = C H W

    `count` is the number of samples of the whole step, over ranks and micro-batches and dropped ones included, so that
    parts add up to the whole and the filter never changes the step size of those that stay. Dropped samples are
    selected away, before and not after the square, and not multiplied by 0: whatever their target holds, even NaN, they
    contribute exactly nothing to the gradient.
    """
    residual = torch.where(per_sample(keep, F), F - F.detach() - g, 0.0)
    error = residual.square().mean(dim=(1, 2, 3))
    logvar = torch.where(keep, logvar, 0.0)
    loss = (time_weight(t, sigma_data) * torch.exp(-logvar) * error + logvar).sum() / count
    return loss, error.detach()
