from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import SCMScheduler
from helpers import Gaussian
from torch import Tensor

from tbcm.method.sampling import consistency_sample, student_times

HALF_PI = math.pi / 2


def no_draw() -> Tensor:
    raise AssertionError("one step draws no noise")


def diffusers_times(steps: int) -> Tensor:
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    return scheduler.timesteps[:-1]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_times_are_those_of_diffusers(steps: int) -> None:
    assert torch.equal(torch.tensor(student_times(steps, HALF_PI)), diffusers_times(steps))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("t_max", [1.5645, 1.2])
def test_times_start_at_the_teachers_own_maximum_and_descend(steps: int, t_max: float) -> None:
    times = student_times(steps, t_max)
    assert len(times) == steps
    assert times[0] == pytest.approx(t_max)
    assert all(0 < later < earlier for earlier, later in itertools.pairwise(times))


def test_one_step_with_the_exact_consistency_function_is_exact() -> None:
    gaussian = Gaussian(mean=0.2, std=0.3, sigma_data=0.5)
    noise = 0.5 * torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    x0 = consistency_sample(gaussian.consistency_F, noise, student_times(1, HALF_PI), 0.5, no_draw)
    torch.testing.assert_close(x0, 0.2 + 0.3 * noise / 0.5, rtol=0, atol=1e-5)


def test_the_network_sees_the_renoised_state_at_each_time() -> None:
    """With f(x, t) = x_0 known, the inputs are noise, then cos(t) x_0 + sin(t) sigma_d n for each later time."""
    gaussian = Gaussian(mean=0.2, std=0.3, sigma_data=0.5)
    noise = 0.5 * torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    fresh = torch.randn(2, 2, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    supply, seen = iter(fresh), []

    def velocity(u: Tensor, t: Tensor) -> Tensor:
        seen.append((u, t))
        return gaussian.consistency_F(u, t)

    times = [1.5, 1.0, 0.4]
    x0 = consistency_sample(velocity, noise, times, 0.5, lambda: next(supply))
    assert next(supply, None) is None
    assert [t.tolist() for _, t in seen] == [pytest.approx([now] * 2) for now in times]
    state = noise
    for (u, _), now, draw in zip(seen, times, [None, *fresh], strict=True):
        if draw is not None:
            state = math.cos(now) * state + math.sin(now) * 0.5 * draw
        torch.testing.assert_close(u, state / 0.5)
        state = gaussian.flow_map(state, torch.full((2,), now))
    torch.testing.assert_close(x0, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_equal_those_of_diffusers_scheduler(steps: int) -> None:
    def velocity(u: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(u.roll(1, -1) * t[:, None, None, None])

    noise = 0.5 * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    ours = consistency_sample(
        velocity, noise, student_times(steps, HALF_PI), 0.5, lambda: torch.randn(noise.shape, generator=generator)
    )
    scheduler = SCMScheduler(sigma_data=0.5)
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    generator, x = torch.Generator().manual_seed(1), noise
    for t in scheduler.timesteps[:-1]:
        output = 0.5 * velocity(x / 0.5, t.expand(3))
        x, theirs = scheduler.step(output, t, x, generator=generator, return_dict=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
