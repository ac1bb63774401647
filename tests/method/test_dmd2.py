"""Distribution matching between Gaussians, whose divergence and its gradients are known."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import Gaussian, over
from torch import Tensor, nn

from tbcm.method.dmd2 import matching_gradient, matching_loss, simulated, velocity_loss
from tbcm.method.sampling import consistency_sample
from tbcm.method.trigflow import renoise, rotate

SIGMA = 0.5
REAL = Gaussian(mean=0.2, std=0.3, sigma_data=SIGMA)


def data(gaussian: Gaussian, x: Tensor, s: Tensor) -> Tensor:
    """E[x_0 | x_s], from the exact velocity."""
    return rotate(x, SIGMA * gaussian.F(x / SIGMA, s), s)


def divergence(mean: Tensor, std: Tensor, real: Gaussian, s: Tensor) -> Tensor:
    """KL between N(mean, std^2) and the real distribution, both noised to s; of one element."""
    variance = (s.cos() * std) ** 2 + (s.sin() * SIGMA) ** 2
    other = real.variance(s)
    shift = (s.cos() * (mean - real.mean)) ** 2
    return 0.5 * ((variance + shift) / other - 1 - (variance / other).log())


def test_the_difference_of_data_is_the_gradient_of_the_divergence() -> None:
    """With cos^2(s) / (sigma_d sin(s))^2, through x = mean + std e, by a quadrature that is exact for it."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(8))
    e, z = (grid.reshape(-1, 1) for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    share = torch.outer(weights, weights).reshape(-1, 1) / (2 * math.pi)
    for angle in (0.1, 0.6, 1.4):
        mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.1, 0.5))
        s = torch.full((64,), angle, dtype=torch.float64)
        wanted = torch.autograd.grad(divergence(mean, std, REAL, s[0]), (mean, std))
        own = Gaussian(-0.1, 0.5, SIGMA)
        x_s = renoise(-0.1 + 0.5 * e, SIGMA * z, s)
        difference = (math.cos(angle) / (SIGMA * math.sin(angle))) ** 2 * (data(own, x_s, s) - data(REAL, x_s, s))
        assert (share * difference).sum().item() == pytest.approx(wanted[0].item(), rel=1e-9)
        assert (share * difference * e).sum().item() == pytest.approx(wanted[1].item(), rel=1e-9)


def test_the_gradient_has_each_samples_own_length_and_is_zero_where_both_agree() -> None:
    x, real, fake = (torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    g = matching_gradient(x, real, fake)
    for p in range(3):
        torch.testing.assert_close(g[p], (fake[p] - real[p]) / (x[p] - real[p]).abs().mean())
    torch.testing.assert_close(matching_gradient(3 * x, 3 * real, 3 * fake), g)  # whatever the units
    assert (matching_gradient(x, real, real) == 0).all()
    assert matching_gradient(x, x, x).isfinite().all()
    # A student that is its teacher is left alone: the second network then says what the teacher says.
    s = torch.tensor([0.3, 0.9, 1.5])
    x_s = renoise(x, SIGMA * real, s)
    assert (matching_gradient(x, data(REAL, x_s, s), data(REAL, x_s, s)) == 0).all()


def test_the_loss_hands_the_gradient_on() -> None:
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    g = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    loss = matching_loss(x, g, SIGMA, count=4)
    loss.backward()
    torch.testing.assert_close(x.grad, g / SIGMA / 12 / 4)
    assert loss.item() == pytest.approx(0.5 * g.square().mean((1, 2, 3)).sum().item() / 4, rel=1e-5)


def test_the_velocity_of_the_samples_is_what_their_loss_is_least_at() -> None:
    """By as much as the square of any difference from it, since the error is orthogonal to all functions of x_s."""
    generator = torch.Generator().manual_seed(0)
    x0 = REAL.mean + REAL.std * torch.randn(20_000, 1, 2, 2, generator=generator)
    z, s = SIGMA * torch.randn(20_000, 1, 2, 2, generator=generator), 1.5 * torch.rand(20_000, generator=generator)
    u = renoise(x0, z, s) / SIGMA

    def loss(F: Tensor) -> float:
        return velocity_loss(F, x0, z, s, SIGMA, count=20_000).item()

    exact, other = REAL.F(u, s), 0.3 * u * over(s, u) + 0.1
    assert loss(exact + other) - loss(exact) == pytest.approx(other.square().mean().item(), rel=0.05)
    assert loss((over(s.cos(), z) * z - over(s.sin(), x0) * x0) / SIGMA) == pytest.approx(0, abs=1e-10)


class Student(nn.Module):
    """The one-step map of a Gaussian whose mean and deviation are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(-0.2)), nn.Parameter(torch.tensor(0.6))

    def forward(self, u: Tensor, t: Tensor) -> Tensor:
        return Gaussian(self.mean, self.std, SIGMA).consistency_F(u, t)  # type: ignore[arg-type]


def test_a_student_is_led_to_the_teachers_distribution() -> None:
    """Beside a second network that follows it perfectly."""
    student, generator, steps = Student(), torch.Generator().manual_seed(0), 150
    optimizer = torch.optim.Adam(student.parameters(), 3e-2)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def kl() -> float:
        with torch.no_grad():
            return divergence(student.mean, student.std, REAL, torch.tensor(0.5)).item()

    before, half = kl(), math.inf
    for step in range(steps):
        noise, z = (SIGMA * torch.randn(64, 1, 2, 2, generator=generator) for _ in range(2))
        x = simulated(student, noise, [math.pi / 2], 0, SIGMA, [])
        s = 0.1 + 1.4 * torch.rand(64, generator=generator)
        with torch.no_grad():
            x_s = renoise(x, z, s)
            own = Gaussian(student.mean.item(), student.std.item(), SIGMA)
            g = matching_gradient(x, data(REAL, x_s, s), data(own, x_s, s))
        optimizer.zero_grad()
        matching_loss(x, g, SIGMA, count=64).backward()
        optimizer.step()
        decay.step()
        half = kl() if step == steps // 2 else half
    assert kl() < half < before and kl() < 1e-3 * before
    assert student.mean.item() == pytest.approx(REAL.mean, abs=0.02)
    assert student.std.item() == pytest.approx(REAL.std, abs=0.02)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_backward_simulation_leads_where_sampling_does_and_differentiates_its_last_step_alone(stage: int) -> None:
    times = [math.pi / 2, 1.1, 0.6]
    noise, *fresh = (SIGMA * torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    weight, asked = torch.tensor(0.4, requires_grad=True), []

    def velocity(u: Tensor, t: Tensor) -> Tensor:
        F = torch.tanh(weight * u * over(t, u))
        asked.append((u, t, F.requires_grad))
        return F

    x = simulated(velocity, noise, times, stage, SIGMA, fresh[:stage])
    assert [grad for *_, grad in asked] == [False] * stage + [True]
    supply: Iterator[Tensor] = iter([f / SIGMA for f in fresh])
    sampled = consistency_sample(velocity, noise, times[: stage + 1], SIGMA, lambda: next(supply))
    torch.testing.assert_close(x, sampled)
    u, t, _ = asked[stage]
    alone = rotate(SIGMA * u, SIGMA * torch.tanh(weight * u * over(t, u)), t)
    (wanted,), (got,) = (torch.autograd.grad(y.sum(), weight) for y in (alone, x))
    torch.testing.assert_close(got, wanted)
