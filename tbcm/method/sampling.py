"""Samplers: the student's multistep consistency sampler, and the times that diffusers' Sana-Sprint uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tbcm.method.rollout import Velocity
from tbcm.method.trigflow import renoise, rotate

START = 1.57080
"""diffusers' rounded pi/2, kept so that latents agree with SanaSprintPipeline's to the last digits."""


def student_times(steps: int, t_max: float) -> list[float]:
    """[t_max], [t_max, 1.3], or an even grid from t_max towards 0. A t_max of pi/2 is taken as diffusers rounds it."""
    start = START if abs(t_max - torch.pi / 2) < 1e-4 else t_max
    if steps == 2:
        return [start, min(1.3, start * 1.3 / START)]
    return torch.linspace(start, 0, steps + 1)[:-1].tolist()


@torch.no_grad()
def consistency_sample(
    velocity: Velocity, noise: Tensor, times: Sequence[float], sigma_data: float, draw: Callable[[], Tensor]
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1): map to x_0, re-noise to the next time, repeat.

    `noise` [P, C, H, W] ~ N(0, sigma_d^2); `draw()` gives fresh standard-normal noise of that shape, one draw after
    each step but the last. Returns x_0 [P, C, H, W] in TrigFlow units (xbar_0 = x_0 / sigma_d for flow matching).
    """
    x = noise
    for i, now in enumerate(times):
        t = torch.full(x.shape[:1], now, dtype=torch.float32, device=x.device)
        x = rotate(x, sigma_data * velocity(x / sigma_data, t).float(), t)
        if i + 1 < len(times):
            x = renoise(x, draw() * sigma_data, torch.full_like(t, times[i + 1]))
    return x
