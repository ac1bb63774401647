"""What the method converges to, on a teacher whose every quantity is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from helpers import AnalyticStudent, Gaussian, random_condition
from tbcm_kernels.tangent import tangent
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tbcm.method.consistency import network_tangents
from tbcm.method.rollout import rollout
from tbcm.method.route import reference_route
from tbcm.method.tbcm import first_training_point, tbcm_loss

HALF_PI = math.pi / 2
SIGMA = 0.5
CENTRED = Gaussian(mean=0.0, std=0.6, sigma_data=SIGMA)


def fixed_point(gaussian: Gaussian, t: Tensor, r: float) -> Tensor:
    """a(t) [B] of the converged student F = a(t) u for a zero-mean Gaussian, differentiable in t (fp64).

    g = 0 reads dG/dt = -x - cot(t) (G - v) / r along the trajectory, G = sigma_d F. There x ~ sqrt(V), V = Var x_t, so
    v = b x with b = V' / (2 V), and for G = a x: a' + (b + cot / r) a = b cot / r - 1. The integrating factor is
    m = sqrt(V) sin^(1/r), hence a(t) = integral_0^t m (b cot / r - 1) / m(t): Gauss-Legendre on tau = t y^3, for which
    the integrand is smooth at 0.
    """
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(100))
    y = (nodes + 1) / 2
    tau, dtau = t[:, None] * y**3, t[:, None] * 3 * y**2 * weights / 2
    difference = gaussian.sigma_data**2 - gaussian.std**2  # V' = 2 sin cos (sigma_d^2 - s^2)

    def m(t: Tensor) -> Tensor:
        return gaussian.variance(t).sqrt() * t.sin() ** (1 / r)

    slope = difference * tau.cos() ** 2 / gaussian.variance(tau) / r - 1
    return (m(tau) * slope * dtau).sum(1) / m(t)


def test_without_r_the_fixed_point_is_the_exact_consistency_function() -> None:
    t = torch.linspace(0.01, HALF_PI, 50, dtype=torch.float64)
    exact = CENTRED.consistency_F(torch.ones(50, 1, 1, 1, dtype=torch.float64), t).flatten()
    torch.testing.assert_close(fixed_point(CENTRED, t, r=1.0), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma_data", [0.5, 0.7, 1.0])
def test_the_tangent_of_the_exact_consistency_function_is_zero(sigma_data: float) -> None:
    gaussian = Gaussian(mean=0.3, std=0.8, sigma_data=sigma_data)
    assert largest_tangent(gaussian, gaussian.consistency_F, r=1.0) < 1e-10


@pytest.mark.parametrize("r", [0.5, 0.75, 1.0])
def test_the_tangent_of_the_fixed_point_is_zero(r: float) -> None:
    def student(u: Tensor, t: Tensor) -> Tensor:
        return fixed_point(CENTRED, t, r)[:, None, None, None] * u

    assert largest_tangent(CENTRED, student, r) < 1e-10
    assert largest_tangent(CENTRED, student, r + 0.1) > 1e-3


def largest_tangent(gaussian: Gaussian, student: Callable[[Tensor, Tensor], Tensor], r: float) -> float:
    """max |g| before normalisation, over states and times of the whole range."""
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0.01, HALF_PI, 40, dtype=torch.float64)
    x = torch.randn(40, 2, 3, 3, generator=generator, dtype=torch.float64)
    u, dxdt = x / gaussian.sigma_data, gaussian.sigma_data * gaussian.F(x / gaussian.sigma_data, t)
    F, dF = torch.func.jvp(student, (u, t), network_tangents(dxdt, t, gaussian.sigma_data))
    return tangent(F, dF, x, dxdt, t, r, gaussian.sigma_data)[1].max().item()


class Student(AnalyticStudent):
    """The teacher's F plus a small network that is 0 at the start; a learned log-variance of the time."""

    def __init__(self, gaussian: Gaussian) -> None:
        super().__init__()
        self.gaussian = gaussian
        self.layers = nn.Sequential(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))
        self.logvar = nn.Linear(2, 1)
        for last in (self.layers[-1], self.logvar):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def F(self, u: Tensor, t: Tensor) -> Tensor:
        inputs = torch.cat([u.flatten(1), t.cos()[:, None], t.sin()[:, None]], 1)
        return self.gaussian.F(u, t) + self.layers(inputs).view_as(u)

    def log_variance(self, t: Tensor) -> Tensor:
        return self.logvar(torch.stack([t.cos(), t.sin()], 1)).squeeze(1)

    def one_step(self, noise: Tensor) -> Tensor:
        with torch.no_grad():
            return -SIGMA * self.F(noise / SIGMA, torch.full((len(noise),), HALF_PI))


def distilled(gaussian: Gaussian, r: float, *, steps: int = 150, prompts: int = 32) -> tuple[Student, Student]:
    """The student before and after the published training step on the exact teacher's rollouts (its EMA)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Student(gaussian)
    ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    optimizer = torch.optim.Adam(student.parameters(), 3e-3, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    before, generator, first = deepcopy(student), torch.Generator().manual_seed(0), first_training_point(HALF_PI)
    condition, keep, w = random_condition(prompts), torch.ones(prompts, dtype=torch.bool), torch.ones(prompts)
    for _ in range(steps):
        noise = SIGMA * torch.randn(prompts, 1, 2, 2, generator=generator)
        route = reference_route(torch.rand(1, 16, generator=generator), HALF_PI)
        points = rollout(gaussian.F, noise, route, w, SIGMA).points(slice(first, None))
        loss, _ = tbcm_loss(student, points, condition, keep, count=points.t.numel(), r=r, sigma_data=SIGMA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        ema.update_parameters(student)
    return before, ema.module


def rmse(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


NOISE = SIGMA * torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(1))


def test_a_network_learns_the_exact_one_step_map() -> None:
    gaussian = Gaussian(mean=0.2, std=0.3, sigma_data=SIGMA)
    exact = gaussian.flow_map(NOISE, torch.full((2000,), HALF_PI))
    before, after = distilled(gaussian, r=1.0)
    assert rmse(before.one_step(NOISE), exact) == pytest.approx(0.3, rel=0.05)  # the teacher predicts the mean
    assert rmse(after.one_step(NOISE), exact) < 0.25 * 0.3


def test_with_r_below_one_a_network_learns_the_fixed_point_and_not_the_exact_map() -> None:
    gaussian = Gaussian(mean=0.0, std=0.3, sigma_data=SIGMA)
    start = torch.tensor([HALF_PI], dtype=torch.float64)
    own, exact = (-fixed_point(gaussian, start, r).float() * NOISE for r in (0.75, 1.0))
    assert rmse(own, exact) > 0.04
    _, after = distilled(gaussian, r=0.75)
    assert rmse(after.one_step(NOISE), own) < 0.02
    assert rmse(after.one_step(NOISE), exact) > 0.03
