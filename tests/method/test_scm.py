from __future__ import annotations

import math

import pytest
import torch
from helpers import Analytic, AnalyticStudent, Gaussian, over, random_condition
from scipy.stats import kstest, norm
from torch import Tensor, nn

from tbcm.method.route import logit_normal_times
from tbcm.method.scm import scm_trajectory
from tbcm.method.tbcm import tbcm_loss
from tbcm.method.types import Trajectory

HALF_PI = math.pi / 2
SIGMA = 0.5
GAUSSIAN = Gaussian(mean=0.2, std=0.3, sigma_data=SIGMA)


def times(count: int, seed: int = 0, t_max: float = HALF_PI) -> Tensor:
    normal = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return logit_normal_times(normal, t_max, sigma_data=SIGMA, mean=0.2, std=1.6)


def noised(gaussian: Gaussian, count: int, seed: int = 0) -> Trajectory:
    """Samples of the Gaussian's data, noised to logit-normal times."""
    generator = torch.Generator().manual_seed(seed)
    x0 = gaussian.mean + gaussian.std * torch.randn(count, 1, 2, 2, generator=generator)
    z = SIGMA * torch.randn(count, 1, 2, 2, generator=generator)
    return scm_trajectory(gaussian.F, x0, z, times(count, seed), torch.ones(count), SIGMA)


@pytest.mark.parametrize("t_max", [HALF_PI, 1.2])
@pytest.mark.parametrize(("sigma_data", "mean", "std"), [(0.5, 0.2, 1.6), (1.0, -0.8, 1.0)])
def test_times_are_logit_normal_below_t_max(sigma_data: float, mean: float, std: float, t_max: float) -> None:
    normal = torch.randn(8000, generator=torch.Generator().manual_seed(0))
    t = logit_normal_times(normal, t_max, sigma_data=sigma_data, mean=mean, std=std)
    assert t.shape == (8000,) and t.dtype == torch.float32
    proposal = norm(mean, std).cdf
    fraction = proposal(torch.log(sigma_data * torch.tan(t.double()))) / proposal(
        math.log(sigma_data * math.tan(t_max))
    )
    assert kstest(fraction, "uniform").pvalue > 0.01
    # Its quantiles: the median time is that of the median draw, and so on.
    for q in (0.1, 0.5, 0.9):
        a = norm(mean, std).ppf(q * proposal(math.log(sigma_data * math.tan(t_max))))
        assert t.quantile(q).item() == pytest.approx(math.atan(math.exp(a) / sigma_data), abs=0.03)


def test_a_time_is_a_growing_function_of_its_own_draw_within_the_range() -> None:
    draws = torch.linspace(-8, 8, 200)  # a generator's normal draws stay below 6
    for t_max in (HALF_PI, 1.2):
        t = logit_normal_times(draws, t_max, sigma_data=SIGMA, mean=0.2, std=1.6)
        assert (t > 0).all() and (t <= torch.tensor(t_max)).all()
        assert (t.diff() >= 0).all() and (t[:120].diff() > 0).all()
        alone = [logit_normal_times(d[None], t_max, sigma_data=SIGMA, mean=0.2, std=1.6) for d in draws]
        assert torch.equal(t, torch.cat(alone))


def test_points_have_the_exact_marginal_at_their_times() -> None:
    path = noised(GAUSSIAN, 4000)
    x, t = path.x.flatten(0, 1), path.t.flatten()
    standard = (x - over(t.cos(), x) * GAUSSIAN.mean) / over(GAUSSIAN.variance(t).sqrt(), x)
    assert kstest(standard.flatten(), "norm").pvalue > 0.01
    for low, high in ((0.0, 0.6), (0.6, 1.2), (1.2, HALF_PI)):  # and at every time, not only over all of them
        assert kstest(standard[(t > low) & (t <= high)].flatten(), "norm").pvalue > 0.01


def test_the_velocity_is_that_of_the_exact_ode_at_each_point() -> None:
    """The probability-flow ODE keeps (x_t - E x_t) / Std x_t, so x(tau) is known along it, and so is its slope at t."""
    path = noised(GAUSSIAN, 500)
    x, t = path.x.flatten(0, 1).double(), path.t.flatten().double()
    standard = (x - over(t.cos(), x) * GAUSSIAN.mean) / over(GAUSSIAN.variance(t).sqrt(), x)

    def along(tau: Tensor) -> Tensor:
        return over(tau.cos(), x) * GAUSSIAN.mean + over(GAUSSIAN.variance(tau).sqrt(), x) * standard

    _, slope = torch.func.jvp(along, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(path.dxdt.flatten(0, 1).double(), slope, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_asked_once_at_each_point() -> None:
    x0, z = (torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    t, asked = torch.tensor([0.3, 1.5, 0.7]), []

    def velocity(u: Tensor, t: Tensor) -> Tensor:
        asked.append((u, t))
        return (weight * u).bfloat16()

    weight, guidance = torch.ones((), requires_grad=True), torch.tensor([4.0, 4.5, 5.0])
    path = scm_trajectory(velocity, x0, z, t, guidance, SIGMA)
    assert [a.shape for a in (path.x, path.dxdt, path.t)] == [(3, 1, 2, 4, 4), (3, 1, 2, 4, 4), (3, 1)]
    for p in range(3):
        torch.testing.assert_close(path.x[p, 0], math.cos(t[p]) * x0[p] + math.sin(t[p]) * z[p])
    ((u, at),) = asked
    torch.testing.assert_close(u * SIGMA, path.x[:, 0])
    assert torch.equal(at, t) and torch.equal(path.t[:, 0], t) and torch.equal(path.guidance, guidance)
    assert path.dxdt.dtype == torch.float32 and not path.dxdt.requires_grad
    torch.testing.assert_close(path.dxdt[:, 0], SIGMA * u.bfloat16().float())
    assert torch.equal(path.x0, x0)


def loss_of(student: nn.Module | Analytic, path: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
    count = len(path.t)
    keep = torch.ones(count, dtype=torch.bool)
    return tbcm_loss(student, path, random_condition(count), keep, count=count, r=1.0, sigma_data=SIGMA)


def test_the_exact_consistency_function_is_the_fixed_point_of_the_loss() -> None:
    path = noised(GAUSSIAN, 300)
    _, exact = loss_of(Analytic(GAUSSIAN.consistency_F), path)
    _, teacher = loss_of(Analytic(GAUSSIAN.F), path)
    # Where t is small the exact F is a difference of nearly equal numbers over sin t, in single precision.
    assert exact["g_norm"].median() < 1e-5 and exact["g_norm"].max() < 1e-3
    assert teacher["g_norm"].max() > 0.1


class Student(AnalyticStudent):
    """The exact consistency function of a Gaussian whose mean and deviation are learned, with a log-variance."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std))
        self.logvar = nn.Parameter(torch.zeros(2))

    def F(self, u: Tensor, t: Tensor) -> Tensor:
        return Gaussian(self.mean, self.std, SIGMA).consistency_F(u, t)  # type: ignore[arg-type]

    def log_variance(self, t: Tensor) -> Tensor:
        return torch.stack([t, t**2], 1) @ self.logvar


def test_training_on_noised_data_finds_the_teachers_consistency_function() -> None:
    student, steps = Student(mean=0.0, std=0.6), 60
    optimizer = torch.optim.Adam(student.parameters(), 5e-2)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        loss, _ = loss_of(student, noised(GAUSSIAN, 64, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    assert student.mean.item() == pytest.approx(GAUSSIAN.mean, abs=0.02)
    assert student.std.item() == pytest.approx(GAUSSIAN.std, abs=0.02)
