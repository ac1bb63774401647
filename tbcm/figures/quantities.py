"""The numbers behind the figures: mathematics only. P prompts, N route points; times in radians."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tbcm.config.methods import Route
from tbcm.method.route import reference_edges
from tbcm.method.trigflow import renoise
from tbcm.method.types import Trajectory


def equivalent_noise(x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """The noise that x_t holds beside x_0: (x_t - cos(t) x_0) / sin(t) (paper Eq. 8), in fp64.

    `x` [P, N, C, H, W], `t` [P, N] positive; `x0` [P, C, H, W], or one for each point [P, N, C, H, W].
    """
    x0 = (x0 if x0.ndim == x.ndim else x0[:, None]).double()
    angle = t.double()[..., None, None, None]
    return (x.double() - torch.cos(angle) * x0) / torch.sin(angle)


def predicted_x0(trajectory: Trajectory) -> Tensor:
    """What the teacher takes for x_0 at every point: cos(t) x_t - sin(t) dx_t/dt, [P, N, C, H, W]."""
    angle = trajectory.t[..., None, None, None]
    return torch.cos(angle) * trajectory.x - torch.sin(angle) * trajectory.dxdt


def forward_states(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The forward process from x_0 [P, C, H, W] with noise [P, C, H, W], at every time of t [P, N]: [P, N, C, H, W]."""
    return torch.stack([renoise(x0, noise, times) for times in t.unbind(1)], dim=1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of samples a [P, N, C, H, W] with b [P, C, H, W]: [P, N] fp64."""
    return torch.cosine_similarity(a.double().flatten(2), b.double().flatten(1)[:, None], dim=-1)


def mean_and_spread(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (0 for a single one) over the first dimension."""
    return values.mean(0), values.std(0, correction=min(1, len(values) - 1))


def same_label_share(points: Tensor, labels: Tensor, neighbours: int = 10) -> float:
    """How many of a point's nearest neighbours have its label, on average: [M, D], [M] -> a share.

    For equally large groups of one distribution it is about 1 / groups; 1 where groups lie apart.
    """
    distance = torch.cdist(points.double(), points.double()).fill_diagonal_(math.inf)
    nearest = distance.topk(min(neighbours, len(points) - 1), largest=False).indices
    return float((labels[nearest] == labels[:, None]).double().mean())


def route_density(route: Route, t: Tensor, t_max: float, sigma_data: float) -> Tensor:
    """The exact density of a route's times but the first (which is always t_max), per radian, at t (fp64).

    `random` and `logit_normal` draw N times from a law f with distribution function F and lose the largest, so the
    others have N / (N - 1) f (1 - F^(N - 1)); `reference` draws one in each of N - 1 bins.
    """
    t = t.double()
    if route.kind == "reference":
        edges = reference_edges(route.points, shift=route.shift, train_timesteps=route.train_timesteps)
        edges = (edges * (t_max / edges[0])).flip(0)
        share = 1 / (edges.diff() * (route.points - 1))
        bins = torch.bucketize(t, edges, right=True) - 1
        inside = (bins >= 0) & (bins < len(share))
        return torch.where(inside, share[bins.clamp(0, len(share) - 1)], 0.0)
    f, F = proposal(route, t, t_max, sigma_data)
    return route.points / (route.points - 1) * f * (1 - F ** (route.points - 1))


def proposal(route: Route, t: Tensor, t_max: float, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Density and distribution function of the law that a `random` or `logit_normal` route's times are drawn from."""
    if route.kind == "random":
        return torch.full_like(t, 1 / t_max), t / t_max

    def standard(times: Tensor) -> Tensor:
        """log(sigma_d tan t), standardised."""
        return (torch.log(sigma_data * torch.tan(times)) - route.p_mean) / route.p_std

    below = torch.special.ndtr(standard(torch.tensor(t_max, dtype=torch.float64)))  # the law is cut off at t_max
    normal = torch.exp(-(standard(t) ** 2) / 2) / math.sqrt(2 * math.pi)
    return normal / (route.p_std * torch.sin(t) * torch.cos(t)) / below, torch.special.ndtr(standard(t)) / below


def relative_error(x0: Tensor, reference: Tensor) -> Tensor:
    """||x_0 - reference|| / ||reference|| of each sample, [P, C, H, W] -> [P] fp64."""
    return (x0 - reference).double().flatten(1).norm(dim=1) / reference.double().flatten(1).norm(dim=1)


def distance_to_black(xbar0: Tensor, black: Tensor) -> Tensor:
    """mse_b of the brightness filter (paper App. D): [P, C, H, W], [C, H, W], scaled latents -> [P]."""
    return (xbar0 - black).square().mean(dim=(1, 2, 3))


def drop_probability(mse: Tensor, threshold: float) -> Tensor:
    """The brightness filter's 1 - mse_b / threshold below the threshold, else 0; elementwise."""
    return (1 - mse / threshold).clamp(min=0) if threshold > 0 else torch.zeros_like(mse)
