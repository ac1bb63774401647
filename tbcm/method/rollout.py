"""Teacher trajectories: where TBCM's training samples come from (paper Sec. 4.1, Algorithm 1, Fig. 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tbcm.method.trigflow import rotate
from tbcm.method.types import Condition, Network, Trajectory

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(u [P, C, H, W], t [P]) -> F [P, C, H, W]."""


def guided(net: Network, condition: Condition, null: Condition, guidance: Tensor) -> Velocity:
    """Classifier-free guidance, F = F_uncond + w (F_cond - F_uncond), both branches in one batch.

    `condition` and `null` lead with P, `guidance` [P] is w.
    """
    both = Condition.cat(null, condition)
    w = guidance.view(-1, 1, 1, 1)

    def velocity(u: Tensor, t: Tensor) -> Tensor:
        uncond, cond = net(torch.cat([u, u]), torch.cat([t, t]), both).F.chunk(2)
        return uncond + w * (cond - uncond)

    return velocity


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
    for i in range(points):
        dxdt = sigma_data * velocity(x / sigma_data, t[:, i]).float()
        xs[:, i], dxdts[:, i] = x, dxdt
        following = t[:, i + 1] if i + 1 < points else torch.zeros_like(t[:, i])
        x = rotate(x, dxdt, t[:, i] - following)
    return Trajectory(xs, dxdts, t, x, guidance)
