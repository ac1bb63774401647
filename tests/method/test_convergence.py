"""What the method converges to, on a teacher whose every quantity is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import Analytic, Gaussian, random_condition
from torch import Tensor, nn

from tbcm.method.consistency import network_tangents, tangent
from tbcm.method.rollout import rollout
from tbcm.method.route import reference_route
from tbcm.method.tbcm import first_training_point, tbcm_loss
from tbcm.method.types import Condition, Prediction

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


class Student(nn.Module):
    """The teacher's F plus a trained correction, 0 at the start; a learned log-variance of the time."""

    def __init__(self, gaussian: Gaussian) -> None:
        super().__init__()
        self.gaussian = gaussian
        self.logvar = nn.Linear(2, 1)
        nn.init.zeros_(self.logvar.weight)
        nn.init.zeros_(self.logvar.bias)

    def correction(self, u: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def F(self, u: Tensor, t: Tensor) -> Tensor:
        return self.gaussian.F(u, t) + self.correction(u, t)

    def forward(
        self,
        u: Tensor,
        t: Tensor,
        condition: Condition,
        guidance: Tensor | None = None,
        tangents: tuple[Tensor, Tensor] | None = None,
    ) -> Prediction:
        answer = Analytic(self.F)(u, t, condition, guidance, tangents)
        return Prediction(answer.F, answer.dF, self.logvar(torch.stack([t.cos(), t.sin()], 1)).squeeze(1))


class Linear(Student):
    """F = (teacher's a(t) + c_0 tan(t / 2) + c_1 sin(2 t)) u: near the solution, and linear in its parameters."""

    def __init__(self, gaussian: Gaussian) -> None:
        super().__init__(gaussian)
        self.coefficients = nn.Parameter(torch.zeros(2))

    def correction(self, u: Tensor, t: Tensor) -> Tensor:
        return (self.coefficients @ torch.stack([(t / 2).tan(), (2 * t).sin()]))[:, None, None, None] * u


class Perceptron(Student):
    def __init__(self, gaussian: Gaussian) -> None:
        super().__init__(gaussian)
        self.layers = nn.Sequential(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def correction(self, u: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([u.flatten(1), t.cos()[:, None], t.sin()[:, None]], 1)).view_as(u)


def train(student: Student, optimizer: torch.optim.Optimizer, *, steps: int, prompts: int, r: float) -> nn.Module:
    """The published step on the exact teacher's rollouts, with a learning rate that decays to 0. Returns the EMA."""
    generator = torch.Generator().manual_seed(0)
    ema = torch.optim.swa_utils.AveragedModel(student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    condition, keep, w = random_condition(prompts), torch.ones(prompts, dtype=torch.bool), torch.ones(prompts)
    for _ in range(steps):
        noise = SIGMA * torch.randn(prompts, 1, 2, 2, generator=generator)
        route = reference_route(torch.rand(1, 16, generator=generator), HALF_PI)
        trajectory = rollout(student.gaussian.F, noise, route, w, SIGMA).points(
            slice(first_training_point(HALF_PI), None)
        )
        loss, _ = tbcm_loss(student, trajectory, condition, keep, count=prompts * 15, r=r, sigma_data=SIGMA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        ema.update_parameters(student)
    return ema.module


def one_step_error(student: Student) -> float:
    """RMSE of the one-step sample to the exact flow map."""
    noise = SIGMA * torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    start = torch.full((2000,), HALF_PI)
    with torch.no_grad():
        x0 = start.cos()[:, None, None, None] * noise - SIGMA * student.F(noise / SIGMA, start)
    return (x0 - student.gaussian.flow_map(noise, start)).square().mean().sqrt().item()


def test_a_network_learns_the_exact_one_step_map() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Perceptron(Gaussian(mean=0.2, std=0.3, sigma_data=SIGMA))
    before = one_step_error(student)
    assert before == pytest.approx(0.3, rel=0.05)  # the teacher's one step lands on the mean, one std away
    trained = train(
        student, torch.optim.Adam(student.parameters(), 3e-3, betas=(0.9, 0.99)), steps=250, prompts=48, r=1.0
    )
    assert one_step_error(trained) < 0.25 * before


@pytest.mark.parametrize(("r", "other"), [(1.0, 0.75), (0.75, 1.0)])
def test_training_converges_to_the_fixed_point_of_its_own_r(r: float, other: float) -> None:
    student = Linear(CENTRED)
    parameters = [{"params": [student.coefficients]}, {"params": student.logvar.parameters(), "lr": 3e-3}]
    train(student, torch.optim.SGD(parameters, 3e-2, momentum=0.9), steps=150, prompts=16, r=r)
    start = torch.tensor([HALF_PI], dtype=torch.float64)
    gain = student.F(torch.ones(1, 1, 1, 1), start.float()).item()
    assert gain == pytest.approx(fixed_point(CENTRED, start, r).item(), rel=0.02)
    assert gain != pytest.approx(fixed_point(CENTRED, start, other).item(), rel=0.05)
