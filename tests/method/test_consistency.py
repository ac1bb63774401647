from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import Gaussian
from tbcm_kernels.consistency_loss import consistency_loss, time_weight
from tbcm_kernels.tangent import tangent
from torch import Tensor

from tbcm.method.consistency import RSchedule, logvar_prior, network_tangents

BATCH, SHAPE = 6, (2, 3, 4)
DIM = math.prod(SHAPE)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(count: int = BATCH) -> Tensor:
    return 0.05 + 1.45 * torch.rand(count, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize(
    ("step", "r"),
    [
        *((0, 0.0), (1000, 0.25), (4000, 1.0), (14_999, 1.0), (15_000, 1.0)),
        *((15_500, 0.9375), (16_000, 0.875), (17_000, 0.75), (20_000, 0.75)),
    ],
)
def test_the_published_r_schedule(step: int, r: float) -> None:
    schedule = RSchedule(warmup_steps=4000, final=0.75, cooldown_start=15_000, cooldown_steps=2000)
    assert schedule(step) == pytest.approx(r, abs=1e-12)


def test_a_cooldown_that_starts_during_the_warmup_blends_both() -> None:
    schedule = RSchedule(warmup_steps=100, final=0.5, cooldown_start=40, cooldown_steps=20)
    assert schedule(50) == pytest.approx(0.5 * 0.5 + 0.5 * 0.5)
    assert schedule(45) == pytest.approx(0.75 * 0.45 + 0.25 * 0.5)
    assert schedule(60) == pytest.approx(0.5)


def test_a_warmup_straight_to_the_final_value() -> None:
    schedule = RSchedule(warmup_steps=4000, final=0.75, cooldown_start=None)
    assert [schedule(s) for s in (0, 2000, 4000, 20_000)] == pytest.approx([0.0, 0.375, 0.75, 0.75])


def test_phases_of_length_zero() -> None:
    assert RSchedule(warmup_steps=0, final=1.0, cooldown_start=None)(0) == 1.0
    step_down = RSchedule(warmup_steps=0, final=0.75, cooldown_start=10, cooldown_steps=0)
    assert [step_down(s) for s in (0, 9, 10, 11)] == [1.0, 1.0, 0.75, 0.75]


def along(gaussian: Gaussian, x: Tensor, t: Tensor, moved: float) -> tuple[Tensor, Tensor]:
    """The probability-flow ODE's exact state a time `moved` later: (x - E x) / Std x is constant."""
    mean = gaussian.mean * t.cos()[:, None, None, None]
    standard = (x - mean) / gaussian.variance(t).sqrt()[:, None, None, None]
    later = t + moved
    std = gaussian.variance(later).sqrt()[:, None, None, None]
    return gaussian.mean * later.cos()[:, None, None, None] + std * standard, later


def test_the_direction_gives_the_derivative_along_the_teachers_ode() -> None:
    gaussian, h = Gaussian(mean=0.2, std=0.3, sigma_data=0.5), 1e-5
    x, t = randn(0, BATCH, *SHAPE), times()

    def student(u: Tensor, t: Tensor) -> Tensor:
        return torch.sin(u * t[:, None, None, None]) + u.roll(1, -1) * t.square()[:, None, None, None]

    def at(moved: float) -> Tensor:
        state, later = along(gaussian, x, t, moved)
        return student(state / 0.5, later)

    dFdt = (at(h) - at(-h)) / (2 * h)
    dxdt = 0.5 * gaussian.F(x / 0.5, t)
    _, dF = torch.func.jvp(student, (x / 0.5, t), network_tangents(dxdt, t, 0.5))
    torch.testing.assert_close(dF, (t.cos() * t.sin())[:, None, None, None] * dFdt, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("r", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_tangent_is_algorithm_1(r: float, sigma_data: float) -> None:
    F, dFdt, x, dxdt = (randn(i, BATCH, *SHAPE).numpy() for i in range(4))
    t = times().numpy()
    expected, norms = [], []
    for b in range(BATCH):
        cos, sin = np.cos(t[b]), np.sin(t[b])
        g = -(cos**2) * (sigma_data * F[b] - dxdt[b]) - r * cos * sin * (x[b] + sigma_data * dFdt[b])
        norms.append(np.sqrt((g**2).sum()))
        expected.append(g / (norms[-1] + 0.1))
    dF = np.cos(t)[:, None, None, None] * np.sin(t)[:, None, None, None] * dFdt
    arguments = (torch.from_numpy(array) for array in (F, dF, x, dxdt, t))
    g, norm = tangent(*arguments, r=r, sigma_data=sigma_data, c=0.1)
    torch.testing.assert_close(g, torch.from_numpy(np.stack(expected)), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(norm, torch.tensor(norms), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("c", [0.1, 1.0])
def test_the_normalised_tangent_is_shorter_than_one(c: float) -> None:
    arguments = [100 * randn(i, BATCH, *SHAPE) for i in range(4)]
    g, norm = tangent(*arguments, times(), r=1.0, sigma_data=0.5, c=c)
    length = g.flatten(1).norm(dim=1)
    assert (length < 1).all()
    torch.testing.assert_close(length, norm / (norm + c))


def test_the_weight_is_one_over_sigma_tan_and_vanishes_at_pi_over_two() -> None:
    t = torch.tensor([math.pi / 4, math.atan(2.0), math.pi / 2])
    torch.testing.assert_close(time_weight(t, 0.5), torch.tensor([2.0, 1.0, 0.0]), rtol=1e-6, atol=1e-6)


def test_the_weight_is_never_negative() -> None:
    """pi/2 rounded to fp32, and as diffusers rounds it, are a little more than pi/2."""
    assert (time_weight(torch.tensor([math.pi / 2, 1.57080]), 0.5) >= 0).all()


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_log_variance_starts_where_it_is_optimal_for_a_tangent_of_norm_one(sigma_data: float) -> None:
    t = times()
    g = randn(2, BATCH, *SHAPE)
    g /= g.flatten(1).norm(dim=1)[:, None, None, None]
    logvar = logvar_prior(t, DIM, sigma_data).requires_grad_()
    keep = torch.ones(BATCH, dtype=torch.bool)
    consistency_loss(randn(0, BATCH, *SHAPE), g, logvar, t, keep, BATCH, sigma_data)[0].backward()
    torch.testing.assert_close(logvar.grad, torch.zeros_like(t), rtol=0, atol=1e-12)
    at_the_end = logvar_prior(torch.tensor([math.pi / 2]), DIM, sigma_data)
    assert at_the_end.isfinite().all()


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """F, g, logvar, t, keep: samples 1 and 4 are dropped."""
    keep = torch.tensor([True, False, True, True, False, True])
    F, logvar = randn(0, BATCH, *SHAPE).requires_grad_(), randn(1, BATCH).requires_grad_()
    return F, 0.1 * randn(2, BATCH, *SHAPE), logvar, times(), keep


def test_the_loss_and_its_gradient_are_what_the_formula_says() -> None:
    """With residual F - sg(F) - g = -g: loss = keep (w e^-logvar |g|^2 / D + logvar) / count, summed."""
    F, g, logvar, t, keep = batch()
    loss, error = consistency_loss(F, g, logvar, t, keep, BATCH, sigma_data=0.5)
    loss.backward()
    w = 1 / (0.5 * t.tan())
    kept, scale = keep.double(), w * (-logvar.detach()).exp()
    squared = g.square().sum((1, 2, 3)) / DIM
    torch.testing.assert_close(loss.detach(), (kept * (scale * squared + logvar.detach())).sum() / BATCH)
    torch.testing.assert_close(error, kept * squared)
    torch.testing.assert_close(F.grad, -2 * (kept * scale)[:, None, None, None] * g / (DIM * BATCH))
    torch.testing.assert_close(logvar.grad, kept * (1 - scale * squared) / BATCH)
    assert not error.requires_grad


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_dropped_samples_contribute_exactly_nothing(poison: float) -> None:
    F, g, logvar, t, keep = batch()
    g[~keep] = poison
    loss, _ = consistency_loss(F, g, logvar, t, keep, BATCH, sigma_data=0.5)
    loss.backward()
    assert loss.isfinite()
    assert (F.grad[~keep] == 0).all()
    assert (logvar.grad[~keep] == 0).all()
    assert (F.grad[keep] != 0).all()


def test_the_filter_does_not_change_the_step_of_those_that_stay() -> None:
    F, g, logvar, t, keep = batch()
    consistency_loss(F, g, logvar, t, keep, BATCH, sigma_data=0.5)[0].backward()
    everybody = F.detach().requires_grad_()
    consistency_loss(everybody, g, logvar.detach(), t, torch.ones_like(keep), BATCH, 0.5)[0].backward()
    assert torch.equal(F.grad[keep], everybody.grad[keep])


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    F, g, logvar, t, keep = batch()
    whole, _ = consistency_loss(F, g, logvar, t, keep, BATCH, sigma_data=0.5)
    whole.backward()
    parts_F, parts_logvar = F.detach().requires_grad_(), logvar.detach().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 1), slice(1, 2), slice(2, 6)):  # the second holds dropped samples only
        loss, _ = consistency_loss(parts_F[part], g[part], parts_logvar[part], t[part], keep[part], BATCH, 0.5)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(parts_F.grad, F.grad)
    torch.testing.assert_close(parts_logvar.grad, logvar.grad)
