"""Phased consistency (PCM: Wang et al. 2024, arXiv 2405.18407), in TrigFlow.

The trajectory is cut into M phases, 0 = e_0 < e_1 < ... < e_M = t_max, even in the solver's timesteps. A jump leads to
the lower end of its own phase and no further,

    f(x_t, t -> e_m) = cos(t - e_m) x_t - sin(t - e_m) sigma_d F(x_t / sigma_d, t),      e_m < t <= e_{m+1},

and is trained as in LCM (`tbcm.method.lcm`), whose M = 1 is. M jumps lead from noise to data without noise in between:
a student of M phases is sampled in M steps. The paper's adversarial term compares f_theta with its target, both at e_m
and noised from there to a time s of the same phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tbcm.method.lcm import Timesteps, jump
from tbcm.method.rollout import Velocity
from tbcm.method.trigflow import per_sample

_ROUNDING = 1e-4
"""Of a phase: a time that is an edge, in fp32, is of the phase below it."""


def phase_of(timesteps: Timesteps, phases: int, t: Tensor) -> Tensor:
    """The number m of the phase that t is in, from 0, elementwise: e_m < t <= e_{m+1} (0 for t = 0), in fp64."""
    return ((timesteps.place(t) * phases - _ROUNDING).ceil() - 1).clamp(0, phases - 1)


def phase_end(timesteps: Timesteps, phases: int, t: Tensor) -> Tensor:
    """e_m for each t, elementwise."""
    return timesteps.time(phase_of(timesteps, phases, t) / phases)


def within_phase(timesteps: Timesteps, phases: int, t: Tensor, s: Tensor) -> Tensor:
    """Times s of the whole range, moved into the phases of t: what share of all timesteps lies below s, lies below it
    in the phase. Elementwise; of one phase s itself, to rounding."""
    return timesteps.time((phase_of(timesteps, phases, t) + timesteps.place(s)) / phases)


def edges(timesteps: Timesteps, phases: int) -> list[float]:
    """[t_max, ..., e_1, 0]."""
    places = torch.arange(phases, -1, -1, dtype=torch.float64) / phases
    return [float(t) for t in timesteps.time(places)]


def renoise_on(x: Tensor, z: Tensor, start: Tensor, s: Tensor) -> Tensor:
    """The forward process from a state x_e at e = `start` on to s >= e, both [B], with z ~ N(0, sigma_d^2) like x:
    x_s = cos(s) / cos(e) x_e + sqrt(sin(s - e) sin(s + e)) / cos(e) z."""
    part = torch.cos(s) / torch.cos(start)
    fresh = (torch.sin((s - start).clamp(min=0)) * torch.sin(s + start)).sqrt() / torch.cos(start)
    return per_sample(part, x) * x + per_sample(fresh, x) * z


@torch.no_grad()
def phased_sample(velocity: Velocity, noise: Tensor, times: Sequence[float], sigma_data: float) -> Tensor:
    """From `noise` [P, C, H, W] ~ N(0, sigma_d^2) along `edges`, a jump a phase. Returns x_0, in TrigFlow units."""
    x = noise
    for now, then in pairwise(times):
        t, end = (torch.full(x.shape[:1], time, dtype=torch.float32, device=x.device) for time in (now, then))
        x = jump(velocity(x / sigma_data, t), x, t, end, sigma_data)
    return x
