"""Phased consistency on a Gaussian teacher, whose flow between any two times is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import Analytic, AnalyticStudent, Gaussian, over, random_condition
from torch import Tensor, nn

from tbcm.method.lcm import Timesteps, answers, lcm_loss, target_state
from tbcm.method.pcm import edges, phase_end, phased_sample, renoise_on, within_phase
from tbcm.method.rollout import rollout
from tbcm.method.route import reference_route
from tbcm.method.trigflow import renoise

HALF_PI = math.pi / 2
SIGMA = 0.5
GAUSSIAN = Gaussian(mean=0.2, std=0.3, sigma_data=SIGMA)


def flow(gaussian: Gaussian, x: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """Where the probability-flow ODE takes x_t at `end`: (x - E x) / Std x stays."""
    standard = (x - over(t.cos(), x) * gaussian.mean) / over(gaussian.variance(t).sqrt(), x)
    return over(end.cos(), x) * gaussian.mean + over(gaussian.variance(end).sqrt(), x) * standard


def phased_F(gaussian: Gaussian, steps: Timesteps, phases: int, u: Tensor, t: Tensor) -> Tensor:
    """The F whose jumps within phases are the flow."""
    x, end = u * SIGMA, phase_end(steps, phases, t).to(t)
    return (over((t - end).cos(), u) * x - flow(gaussian, x, t, end)) / over((t - end).sin() * SIGMA, u)


@pytest.mark.parametrize("t_max", [HALF_PI, 1.3])
@pytest.mark.parametrize("phases", [1, 2, 4, 7])
def test_a_phase_ends_at_the_next_of_even_edges_below(phases: int, t_max: float) -> None:
    steps = Timesteps(t_max, shift=3.0)
    found = edges(steps, phases)
    assert found[0] == pytest.approx(t_max, abs=1e-6) and found[-1] == 0 and len(found) == phases + 1
    torch.testing.assert_close(
        steps.place(torch.tensor(found)), torch.linspace(1, 0, phases + 1, dtype=torch.float64), rtol=0, atol=1e-6
    )
    for high, low in itertools.pairwise(found):
        inside = torch.tensor([high, (high + low) / 2, low + 0.01 * (high - low)])
        assert torch.equal(phase_end(steps, phases, inside), torch.tensor([low] * 3))
        s = torch.linspace(0.01, t_max, 20)
        moved = within_phase(steps, phases, torch.full_like(s, high), s)
        assert (moved >= low).all() and (moved <= high + 1e-6).all() and (moved.diff() > 0).all()
        if phases == 1:
            torch.testing.assert_close(moved, s)
    assert phase_end(steps, phases, torch.zeros(1)).item() == 0


def test_noise_is_added_to_what_has_some_as_if_to_data() -> None:
    e, s = torch.tensor([0.0, 0.3, 0.8, 1.2]), torch.tensor([0.4, 0.9, 0.8, HALF_PI])
    x0, z, fresh = (torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(3))
    found = renoise_on(renoise(x0, z, e), fresh, e, s)
    of_data = found - renoise_on(renoise(torch.zeros_like(x0), z, e), fresh, e, s)
    torch.testing.assert_close(of_data, over(s.cos(), x0) * x0, rtol=1e-4, atol=1e-6)
    one, none = torch.ones_like(x0), torch.zeros_like(x0)
    kept = renoise_on(renoise(none, one, e), none, e, s)  # variances of what was there and what comes
    added = renoise_on(none, one, e, s)
    torch.testing.assert_close(kept**2 + added**2, over(s.sin() ** 2, x0).expand_as(x0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[:1], renoise(x0, fresh, s)[:1])
    torch.testing.assert_close(found[2], renoise(x0, z, e)[2])


def test_the_target_is_the_flow_to_the_end_of_the_phase_as_the_step_goes_to_zero() -> None:
    """With the error of a first-order solver's single step; steps end with their phase."""
    steps, phases = Timesteps(HALF_PI), 4
    t = torch.linspace(0.1, HALF_PI, 41, dtype=torch.float64)
    x = torch.randn(41, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dxdt, end = SIGMA * GAUSSIAN.F(x / SIGMA, t), phase_end(steps, phases, t).double()
    exact = Analytic(lambda u, t: phased_F(GAUSSIAN, steps, phases, u, t))
    errors = []
    for stride in (0.04, 0.02, 0.01, 0.005):
        lower = torch.maximum(t - stride, end)
        found = target_state(exact, x, dxdt, t, lower, end, random_condition(41), torch.ones(41), SIGMA)
        errors.append((found - flow(GAUSSIAN, x, t, end)).abs().max().item())
    assert [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([4, 4, 4], rel=0.2) and errors[-1] < 1e-4
    whole = flow(GAUSSIAN, x, t, torch.zeros_like(t))
    assert (whole - flow(GAUSSIAN, x, t, end)).abs().max() > 0.1  # which is not LCM's


@pytest.mark.parametrize("phases", [1, 2, 4])
def test_jumps_from_phase_to_phase_are_the_flow_from_noise_to_data(phases: int) -> None:
    steps = Timesteps(HALF_PI, shift=3.0)
    noise = SIGMA * torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    asked: list[Tensor] = []

    def velocity(u: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return phased_F(GAUSSIAN, steps, phases, u, t)

    x0 = phased_sample(velocity, noise, edges(steps, phases), SIGMA)
    torch.testing.assert_close(x0, GAUSSIAN.flow_map(noise, torch.full((4,), HALF_PI)), rtol=0, atol=1e-5)
    assert [t[0].item() for t in asked] == edges(steps, phases)[:-1]


def test_a_teacher_sampled_by_phases_takes_its_own_first_order_steps() -> None:
    """Those of its rollouts (elsewhere equal to the pipelines' schedulers)."""
    noise, times = (
        SIGMA * torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
        edges(Timesteps(HALF_PI, shift=2.0), 5),
    )
    ours = phased_sample(GAUSSIAN.F, noise, times, SIGMA)
    theirs = rollout(GAUSSIAN.F, noise, torch.tensor([times[:-1]]), torch.ones(3), SIGMA).x0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


class Student(AnalyticStudent):
    """The exact jumps of a Gaussian whose mean and deviation are learned."""

    def __init__(self, steps: Timesteps, phases: int) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.6))
        self.steps, self.phases = steps, phases

    def F(self, u: Tensor, t: Tensor) -> Tensor:
        return phased_F(Gaussian(self.mean, self.std, SIGMA), self.steps, self.phases, u, t)  # type: ignore[arg-type]

    def log_variance(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)


def test_training_finds_the_teachers_jumps() -> None:
    steps, phases, updates = Timesteps(HALF_PI), 2, 60
    student, generator = Student(steps, phases), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(student.parameters(), 5e-2)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / updates)
    for _ in range(updates):
        noise = SIGMA * torch.randn(16, 1, 2, 2, generator=generator)
        way = rollout(
            GAUSSIAN.F, noise, reference_route(torch.rand(1, 32, generator=generator), HALF_PI), torch.ones(16), SIGMA
        )
        end = phase_end(steps, phases, way.t)
        lower = steps.below(way.t, 1 / 50, end)
        pair = answers(student, student, way, random_condition(16), lower=lower, end=end, sigma_data=SIGMA)
        optimizer.zero_grad()
        lcm_loss(*pair, torch.ones(16 * 32, dtype=torch.bool), count=16 * 32, sigma_data=SIGMA)[0].backward()
        optimizer.step()
        decay.step()
    assert student.mean.item() == pytest.approx(GAUSSIAN.mean, abs=0.02)
    assert student.std.item() == pytest.approx(GAUSSIAN.std, abs=0.03)
