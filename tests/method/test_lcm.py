"""Discrete consistency distillation on a Gaussian teacher, whose flow map is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from helpers import Analytic, AnalyticStudent, Gaussian, random_condition
from torch import Tensor, nn

from tbcm.method.lcm import Timesteps, answers, distance, jump, lcm_loss, target_state
from tbcm.method.rollout import rollout
from tbcm.method.route import reference_route
from tbcm.method.types import Trajectory

HALF_PI = math.pi / 2
SIGMA = 0.5
GAUSSIAN = Gaussian(mean=0.2, std=0.3, sigma_data=SIGMA)


@pytest.mark.parametrize("t_max", [HALF_PI, 1.3])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_timesteps_are_even_in_the_place_of_a_shifted_flow_schedule(shift: float, t_max: float) -> None:
    steps = Timesteps(t_max, shift)
    q = torch.linspace(0, 1, 51, dtype=torch.float64)
    t = steps.time(q)
    assert t.dtype == torch.float32 and t[0] == 0 and t[-1] == torch.tensor(t_max)
    s = torch.tan(t.double() * HALF_PI / t_max) / (1 + torch.tan(t.double() * HALF_PI / t_max))  # sin / (sin + cos)
    torch.testing.assert_close(s[1:-1], (shift * q / (1 + (shift - 1) * q))[1:-1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(steps.place(t), q, rtol=0, atol=1e-6)
    # A step of k = 1/50 leads from each grid time to the one before, the first to 0, and none below its end.
    zero = torch.zeros_like(t)
    torch.testing.assert_close(steps.below(t, 1 / 50, zero)[1:], t[:-1], rtol=0, atol=3e-6)
    assert torch.equal(steps.below(t, 1 / 50, torch.full_like(t, 0.3)), steps.below(t, 1 / 50, zero).clamp(min=0.3))


def states(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, its exact velocity and t, over the whole range of times."""
    t = torch.linspace(0.05, HALF_PI, count, dtype=dtype)
    x = torch.randn(count, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x = t.cos()[:, None, None, None] * GAUSSIAN.mean + x * GAUSSIAN.variance(t).sqrt()[:, None, None, None]
    return x, SIGMA * GAUSSIAN.F(x / SIGMA, t), t


def target_error(stride: float) -> float:
    """How far the target of the exact consistency function is from that function itself."""
    x, dxdt, t = states(40)
    lower = (t - stride).clamp(min=0)
    exact = Analytic(GAUSSIAN.consistency_F)
    found = target_state(exact, x, dxdt, t, lower, torch.zeros_like(t), random_condition(40), torch.ones(40), SIGMA)
    return (found - GAUSSIAN.flow_map(x, t)).abs().max().item()


def test_the_target_is_the_exact_consistency_function_as_the_step_goes_to_zero() -> None:
    """With the error of a first-order solver's single step: of second order."""
    errors = [target_error(stride) for stride in (0.08, 0.04, 0.02, 0.01)]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert ratios == pytest.approx([4, 4, 4], rel=0.15) and errors[-1] < 2e-4


def test_at_the_end_the_target_is_the_solvers_own_and_the_network_is_not_asked_there() -> None:
    """Where the boundary condition alone says what is right, and a network may be undefined."""
    x, dxdt, t = states(3)
    t, lower, end = t[:2], torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    def undefined_at_zero(u: Tensor, t: Tensor) -> Tensor:
        return u / t[:, None, None, None]

    found = target_state(
        Analytic(undefined_at_zero), x[:2], dxdt[:2], t, lower, end, random_condition(2), torch.ones(2), SIGMA
    )
    cos, sin = t.cos()[:, None, None, None], t.sin()[:, None, None, None]
    torch.testing.assert_close(found, cos * x[:2] - sin * dxdt[:2])


def test_distances_by_hand_and_of_tiny_differences() -> None:
    a, b = torch.tensor([[3.0, 0.0], [1e-6, 1e-6]]), torch.zeros(2, 2)
    huber = distance(a, b, "huber", 4.0)
    assert huber[0].item() == pytest.approx((5 - 4) / 2)  # sqrt(9 + 16) - 4
    assert huber[1].item() == pytest.approx(1e-12 / 8, rel=1e-5)  # a square as long as it is far below c
    assert distance(a, b, "l2", 4.0)[0].item() == pytest.approx(4.5)


class Text(nn.Module):
    """F = tanh(a u) + b t w + c text."""

    def __init__(self, a: float, b: float, c: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([a, b, c]))

    def forward(self, u: Tensor, t: Tensor, condition: object, guidance: Tensor) -> object:
        a, b, c = self.weights
        text = condition.tensors["embeds"].mean((1, 2)).repeat_interleave(len(u) // len(condition))  # type: ignore
        return Analytic(lambda u, t: torch.tanh(a * u) + (b * t * guidance + c * text)[:, None, None, None])(
            u,
            t,
            condition,  # type: ignore[arg-type]
        )


def path() -> Trajectory:
    noise = SIGMA * torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([[HALF_PI, 0.8], [1.4, 0.1], [1.3, 0.2]])
    return rollout(GAUSSIAN.F, noise, t, torch.tensor([4.0, 4.5, 5.0]), SIGMA)


@pytest.mark.parametrize("kind", ["huber", "l2"])
def test_the_loss_is_algorithm_1_sample_by_sample(kind: str) -> None:
    way, condition, keep = path(), random_condition(3), torch.tensor([True, False, True])
    student, target, c = Text(0.7, 0.3, 0.2), Text(0.6, 0.2, 0.4), 0.01
    lower = (way.t - 0.15).clamp(min=0)
    pair = answers(student, target, way, condition, lower=lower, end=torch.zeros_like(way.t), sigma_data=SIGMA)
    kept = keep.repeat_interleave(2)
    loss, error = lcm_loss(*pair, kept, count=99, sigma_data=SIGMA, kind=kind, huber_c=c)  # type: ignore[arg-type]
    loss.backward()
    assert (student.weights.grad != 0).all() and target.weights.grad is None
    total = 0.0
    for p in range(3):
        text = condition.tensors["embeds"][p].mean()
        for i in range(2):
            x, v, t, w = way.x[p, i], way.dxdt[p, i], way.t[p, i], way.guidance[p]
            s = lower[p, i]

            def f(net: Text, x: Tensor, t: Tensor, w: Tensor = w, text: Tensor = text) -> Tensor:
                a, b, c = net.weights.tolist()
                return t.cos() * x - t.sin() * SIGMA * (torch.tanh(a * x / SIGMA) + b * t * w + c * text)

            stepped = (t - s).cos() * x - (t - s).sin() * v
            d = (f(student, x, t) - f(target, stepped, s)) / SIGMA
            sample = p * 2 + i  # prompt-major
            assert error[sample].item() == pytest.approx(d.square().mean().item(), rel=1e-4)
            if keep[p]:
                total += (d.square() if kind == "l2" else (d.square() + c**2).sqrt() - c).mean().item()
    assert loss.item() == pytest.approx(total / 99, rel=1e-4)


class Student(AnalyticStudent):
    """The exact consistency function of a Gaussian whose mean and deviation are learned."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std))

    def F(self, u: Tensor, t: Tensor) -> Tensor:
        return Gaussian(self.mean, self.std, SIGMA).consistency_F(u, t)  # type: ignore[arg-type]

    def log_variance(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)


def trained(loss_of: Callable[[Student, Trajectory], Tensor], steps: int = 80) -> Student:
    """On the exact teacher's rollouts."""
    student, generator = Student(mean=0.0, std=0.6), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(student.parameters(), 5e-2)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        noise = SIGMA * torch.randn(16, 1, 2, 2, generator=generator)
        route = reference_route(torch.rand(1, 32, generator=generator), HALF_PI)
        optimizer.zero_grad()
        loss_of(student, rollout(GAUSSIAN.F, noise, route, torch.ones(16), SIGMA)).backward()
        optimizer.step()
        decay.step()
    return student


def test_training_on_the_teachers_trajectories_finds_its_consistency_function() -> None:
    """From the student's own answer a step on (target_decay = 0)."""
    steps = Timesteps(HALF_PI)

    def loss_of(student: Student, way: Trajectory) -> Tensor:
        end, keep = torch.zeros_like(way.t), torch.ones(16 * 32, dtype=torch.bool)
        lower, condition = steps.below(way.t, 1 / 50, end), random_condition(16)
        pair = answers(student, student, way, condition, lower=lower, end=end, sigma_data=SIGMA)
        return lcm_loss(*pair, keep, count=16 * 32, sigma_data=SIGMA)[0]

    student = trained(loss_of)
    # What a solver of steps of 1/50 has for the deviation is a little off the exact one.
    assert student.mean.item() == pytest.approx(GAUSSIAN.mean, abs=0.02)
    assert student.std.item() == pytest.approx(GAUSSIAN.std, abs=0.03)


def test_a_jump_to_zero_is_the_consistency_function() -> None:
    x, _, t = states(5, torch.float32)
    found = jump(GAUSSIAN.consistency_F(x / SIGMA, t), x, t, torch.zeros_like(t), SIGMA)
    torch.testing.assert_close(found, GAUSSIAN.flow_map(x, t), rtol=1e-4, atol=1e-5)
