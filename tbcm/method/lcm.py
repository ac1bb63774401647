"""Discrete consistency distillation in latents (LCM: Luo et al. 2023, arXiv 2310.04378, Algorithm 1), in TrigFlow.

From a state x_t on a trajectory a step of the guided teacher's solver (DDIM: the first-order step of flow matching and
of variance-preserving teachers alike) leads k timesteps on, and the student is to say the same of both states:

    x^_s = cos(t - s) x_t - sin(t - s) dx_t/dt                               (dx_t/dt with guidance w)
    loss = d( f_theta(x_t, t -> e), stopgrad f_theta-(x^_s, s -> e) ),       e <= s < t
    f(x_t, t -> e) = cos(t - e) x_t - sin(t - e) sigma_d F(x_t / sigma_d, t)

e = 0 is LCM: f is then the consistency function, which has the boundary condition f(x_0, 0) = x_0 by itself, so that
LCM's c_skip and c_out are not needed. theta- is an average of the student's weights, or theta itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tbcm.method.trigflow import flow_time, per_sample, rotate, time_from_flow
from tbcm.method.types import Condition, Network, Trajectory

Distance = Literal["huber", "l2"]


@dataclass(frozen=True)
class Timesteps:
    """The solver's even timesteps as places q in [0, 1] of a flow schedule, s = shift q / (1 + (shift - 1) q), and its
    TrigFlow times: q = 1 is t_max. In fp64, since neighbours are near each other; times come back in fp32."""

    t_max: float
    shift: float = 1.0

    def place(self, t: Tensor) -> Tensor:
        """q of times t, elementwise."""
        s = flow_time(t.double() * (torch.pi / 2 / self.t_max))
        return (s / (self.shift - (self.shift - 1) * s)).clamp(0, 1)

    def time(self, q: Tensor) -> Tensor:
        """t of places q, elementwise."""
        s = self.shift * q / (1 + (self.shift - 1) * q)
        return (time_from_flow(s) * (self.t_max * 2 / torch.pi)).float()

    def below(self, t: Tensor, stride: float, end: Tensor) -> Tensor:
        """The times that a step of the solver leads to: `stride` in q below t, and not below `end`."""
        return torch.maximum(self.time((self.place(t) - stride).clamp(min=0)), end)


def jump(F: Tensor, x: Tensor, t: Tensor, end: Tensor, sigma_data: float) -> Tensor:
    """f(x_t, t -> e) [B, C, H, W], in fp32: where the network's answer F leads from t [B] to e [B]."""
    return rotate(x, sigma_data * F.float(), t - end)


def distance(a: Tensor, b: Tensor, kind: Distance, huber_c: float) -> Tensor:
    """Of samples [B, ...], means over a sample's elements [B]: pseudo-Huber sqrt(|a - b|^2 + c^2) - c, or squares."""
    square = (a - b).square()
    if kind == "huber":  # in a form that loses no digits where |a - b| is far below c
        square = square / ((square + huber_c**2).sqrt() + huber_c)
    return square.flatten(1).mean(1)


def answers(
    student: Network,
    target: Network,
    trajectory: Trajectory,
    condition: Condition,
    *,
    lower: Tensor,
    end: Tensor,
    sigma_data: float,
) -> tuple[Tensor, Tensor]:
    """f_theta(x_t, t -> e) with its graph and f_theta-(x^_s, s -> e), [B = P N, C, H, W] each, at all points of
    `trajectory` (P prompts, N points). `lower` and `end` [P, N] are s and e of each."""
    x, dxdt, t = trajectory.x.flatten(0, 1), trajectory.dxdt.flatten(0, 1), trajectory.t.flatten()
    guidance, lower, end = trajectory.guidance.repeat_interleave(trajectory.t.shape[1]), lower.flatten(), end.flatten()
    wanted = target_state(target, x, dxdt, t, lower, end, condition, guidance, sigma_data)
    F = student(x / sigma_data, t, condition, guidance).F
    return jump(F, x, t, end, sigma_data), wanted


def lcm_loss(
    got: Tensor,
    wanted: Tensor,
    keep: Tensor,
    *,
    count: int,
    sigma_data: float,
    kind: Distance = "huber",
    huber_c: float = 0.001,
) -> tuple[Tensor, Tensor]:
    """The loss of `answers`, and their mean squared differences [B], which carry no graph.

    `keep` [B] bool: which samples count; `count`: samples of the whole step, by which the sum is divided. Distances are
    of states over sigma_data, whose elements are of size 1 whatever sigma_data is.
    """
    got, wanted = got / sigma_data, wanted / sigma_data
    loss = torch.where(keep, distance(got, wanted, kind, huber_c), 0.0).sum() / count
    return loss, distance(got.detach(), wanted, "l2", huber_c)


@torch.no_grad()
def target_state(
    target: Network,
    x: Tensor,
    dxdt: Tensor,
    t: Tensor,
    lower: Tensor,
    end: Tensor,
    condition: Condition,
    guidance: Tensor,
    sigma_data: float,
) -> Tensor:
    """f_theta-(x^_s, s -> e) [B, C, H, W]. Where s = e that is x^_s itself, and the network, which need not be defined
    at 0, is asked at t in its place."""
    stepped, inside = rotate(x, dxdt, t - lower), lower > end
    F = target(stepped / sigma_data, torch.where(inside, lower, t), condition, guidance).F
    return torch.where(per_sample(inside, x), jump(F, stepped, lower, end, sigma_data), stepped)
