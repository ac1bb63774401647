"""sCM's training samples: noised data instead of teacher trajectories (Lu & Song 2024, arXiv 2410.11081, Algorithm 1).

The loss is TBCM's; only (x_t, dx_t/dt, t) come from elsewhere:

    x_0 = sigma_d xbar_0 of an image,    z ~ N(0, sigma_d^2 I),    sigma_d tan t = e^a, a ~ N(P_mean, P_std^2)
    x_t = cos(t) x_0 + sin(t) z,         dx_t/dt = sigma_d F_teacher(x_t / sigma_d, t)
"""

from __future__ import annotations

import torch
from tbcm_kernels.trigflow_step import combined
from torch import Tensor

from tbcm.method.rollout import Velocity
from tbcm.method.trigflow import renoise
from tbcm.method.types import Trajectory


@torch.no_grad()
def scm_trajectory(
    velocity: Velocity, x0: Tensor, z: Tensor, t: Tensor, guidance: Tensor, sigma_data: float
) -> Trajectory:
    """One point of the forward process for each sample, with the teacher's velocity there: a trajectory of N = 1.

    `x0` [P, C, H, W] data in TrigFlow units, `z` [P, C, H, W] ~ N(0, sigma_d^2), `t` [P] positive, `guidance` [P] what
    `velocity` was made with; all fp32.
    """
    x = renoise(x0, z, t)
    dxdt = sigma_data * combined(velocity(x / sigma_data, t), guidance)
    return Trajectory(x[:, None], dxdt[:, None], t[:, None], x0, guidance)
