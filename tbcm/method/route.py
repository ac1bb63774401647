"""Routes: the descending times t_0 = t_max > t_1 > ... > t_{N-1} > 0 of a trajectory (paper Sec. 4.2, Fig. 7, Tab. 4).

Each function maps draws [R, N] (uniform in [0, 1), or standard normal) to R routes [R, N], so that whoever owns the
randomness decides how many routes there are and what they depend on. Times are fp32, computed in fp64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tbcm.method.trigflow import time_from_flow


def _route(t: Tensor, t_max: float) -> Tensor:
    """Sorted descending, the largest replaced by t_max, where a trajectory has to start."""
    t = t.sort(dim=-1, descending=True).values
    t[..., 0] = t_max
    return t.float()


def random_route(uniform: Tensor, t_max: float) -> Tensor:
    """N uniform draws on (0, t_max]: a generator's draw may be 0, where w(t) is infinite, but never 1."""
    return _route((1 - uniform.double()) * t_max, t_max)


def logit_normal_route(
    normal: Tensor, t_max: float, *, sigma_data: float, mean: float = 0.2, std: float = 1.6
) -> Tensor:
    """Draws of `logit_normal_times`."""
    return _route(logit_normal_times(normal, t_max, sigma_data=sigma_data, mean=mean, std=std), t_max)


def logit_normal_times(
    normal: Tensor, t_max: float, *, sigma_data: float, mean: float = 0.2, std: float = 1.6
) -> Tensor:
    """sigma_d tan t = e^a, a ~ N(mean, std^2), cut off at t_max (sCM's proposal; garbled in the paper), elementwise."""
    # Cut off through the inverse distribution function: clamping would put several points of a route at t_max.
    highest = (math.log(sigma_data * math.sin(t_max) / max(math.cos(t_max), 1e-16)) - mean) / std
    below = 0.5 * math.erfc(-highest / math.sqrt(2))  # the share of the proposal below t_max
    normal = torch.special.ndtri(torch.special.ndtr(normal.double()) * below)
    return torch.atan2((normal * std + mean).exp(), torch.full_like(normal, sigma_data)).float()


def reference_edges(
    points: int, *, shift: float = 2.5, train_timesteps: int = 1000, device: torch.device | None = None
) -> Tensor:
    """Bin edges [N] of the reference route, fp64: a flow-Euler schedule whose shift is applied twice, as published.

    q = linspace(1, shift / (T + shift - 1), N) is the shifted schedule, s = shift q / (1 + (shift - 1) q) shifts it
    again, and the edges are its TrigFlow times (inverse of paper Eq. 5).
    """
    q = torch.linspace(1, shift / (train_timesteps + shift - 1), points, dtype=torch.float64, device=device)
    return time_from_flow(shift * q / (1 + (shift - 1) * q))


def reference_route(uniform: Tensor, t_max: float, *, shift: float = 2.5, train_timesteps: int = 1000) -> Tensor:
    """t_0 = t_max, then one uniform draw in each bin between neighbouring edges: every sub-interval is visited once."""
    edges = reference_edges(uniform.shape[-1], shift=shift, train_timesteps=train_timesteps, device=uniform.device)
    edges = edges * (t_max / edges[0])  # a teacher that starts below pi/2 keeps the shape of the schedule
    upper, lower = edges[:-1], edges[1:]
    inner = lower + uniform.double()[..., 1:] * (upper - lower)
    return torch.cat([torch.full_like(inner[..., :1], t_max), inner], dim=-1).float()
