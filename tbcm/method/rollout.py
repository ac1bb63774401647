"""Teacher trajectories: where TBCM's training samples come from (paper Sec. 4.1, Algorithm 1, Fig. 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tbcm_kernels.trigflow_step import trigflow_step
from torch import Tensor
from torch.nn import functional

from tbcm.method.types import Condition, Network, Trajectory

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(u [P, C, H, W], t [P]) -> F [P, C, H, W], or [2 P, C, H, W]: without and with the condition, to be `combined`."""


def guided(net: Network, condition: Condition, null: Condition) -> Velocity:
    """Both branches of classifier-free guidance in one batch. `condition` and `null` lead with P."""
    both = Condition.cat(null, condition)
    return lambda u, t: net(torch.cat([u, u]), torch.cat([t, t]), both).F


def embedded(net: Network, condition: Condition, guidance: Tensor) -> Velocity:
    """A guidance-distilled network: w [P] goes in through its embedding, one branch only."""
    return lambda u, t: net(u, t, condition, guidance).F


@torch.no_grad()
def rollout(velocity: Velocity, noise: Tensor, t: Tensor, guidance: Tensor, sigma_data: float) -> Trajectory:
    """Follows the probability-flow ODE from pure noise along the route to t = 0, keeping every (x_t, dx_t/dt).

    `noise` [P, C, H, W] ~ N(0, sigma_d^2), `t` [P, N] (or [1, N], shared) descending and positive; all fp32.
    """
    prompts, points = noise.shape[0], t.shape[1]
    t = t.expand(prompts, points)
    xs = noise.new_empty(prompts, points, *noise.shape[1:])
    dxdts = torch.empty_like(xs)
    x = noise
    steps = t - functional.pad(t[:, 1:], (0, 1))
    for i in range(points):
        F = velocity(x / sigma_data, t[:, i])
        x = trigflow_step(F, x, guidance, steps[:, i], xs, dxdts, i, sigma_data)
    return Trajectory(xs, dxdts, t, x, guidance)
