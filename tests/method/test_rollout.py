from __future__ import annotations

import math

import torch
from helpers import Gaussian, random_condition
from tbcm_kernels.trigflow_step import combined
from torch import Tensor

from tbcm.method.rollout import embedded, guided, rollout
from tbcm.method.types import Condition, Prediction

HALF_PI = math.pi / 2
GAUSSIAN = Gaussian(mean=0.2, std=0.3, sigma_data=0.5)


def noise(prompts: int) -> Tensor:
    return 0.5 * torch.randn(prompts, 2, 3, 4, generator=torch.Generator().manual_seed(0))


def descending(*shape: int) -> Tensor:
    t = torch.rand(*shape, generator=torch.Generator().manual_seed(1)).sort(-1, descending=True).values
    return t * 1.5 + 0.01


def conditional(
    u: Tensor,
    t: Tensor,
    condition: Condition,
    guidance: Tensor | None = None,
    tangents: tuple[Tensor, Tensor] | None = None,
) -> Prediction:
    """A network of its prompt, its time and its embedded guidance; rows do not mix."""
    text = (condition.tensors["embeds"] * condition.tensors["mask"][..., None]).sum((1, 2))
    scale = torch.ones_like(t) if guidance is None else guidance
    return Prediction(torch.sin(u * text[:, None, None, None]) * (t * scale)[:, None, None, None])


def test_the_end_point_converges_to_the_exact_flow_map_at_first_order() -> None:
    x = noise(8)
    exact = GAUSSIAN.flow_map(x, torch.full((8,), HALF_PI))
    error = {}
    for points in (16, 32, 64, 128):
        t = torch.linspace(HALF_PI, 0, points + 1)[None, :-1]
        error[points] = (rollout(GAUSSIAN.F, x, t, torch.ones(8), 0.5).x0 - exact).square().mean().sqrt().item()
    assert error[16] < 0.05
    for points in (16, 32, 64):
        assert 1.8 < error[points] / error[2 * points] < 2.2


def test_what_is_stored_is_the_state_and_the_teachers_velocity_there() -> None:
    x, t, w = noise(3), descending(3, 5), torch.tensor([4.0, 4.5, 5.0])
    trajectory = rollout(GAUSSIAN.F, x, t, w, 0.5)
    assert trajectory.x.shape == trajectory.dxdt.shape == (3, 5, 2, 3, 4)
    assert torch.equal(trajectory.x[:, 0], x)
    assert torch.equal(trajectory.t, t)
    assert torch.equal(trajectory.guidance, w)
    flat_x, flat_t = trajectory.x.flatten(0, 1), trajectory.t.flatten()
    torch.testing.assert_close(trajectory.dxdt.flatten(0, 1), 0.5 * GAUSSIAN.F(flat_x / 0.5, flat_t))


def test_each_step_is_the_papers_rotation() -> None:
    """Algorithm 1: x <- cos(t_i - t_{i+1}) x - sin(t_i - t_{i+1}) dx/dt, with t_N = 0."""
    x, t = noise(3), descending(3, 5)
    trajectory = rollout(GAUSSIAN.F, x, t, torch.ones(3), 0.5)
    following = torch.cat([t[:, 1:], torch.zeros(3, 1)], 1)
    for p in range(3):
        for i in range(5):
            angle = float(t[p, i] - following[p, i])
            expected = math.cos(angle) * trajectory.x[p, i] - math.sin(angle) * trajectory.dxdt[p, i]
            stepped = trajectory.x[p, i + 1] if i < 4 else trajectory.x0[p]
            torch.testing.assert_close(stepped, expected)


def test_a_prompts_trajectory_does_not_depend_on_its_neighbours() -> None:
    x, t = noise(4), descending(4, 6)
    together = rollout(GAUSSIAN.F, x, t, torch.arange(4.0), 0.5)
    for p in range(4):
        alone = rollout(GAUSSIAN.F, x[p : p + 1], t[p : p + 1], torch.ones(1), 0.5)
        torch.testing.assert_close(together.x[p], alone.x[0])
        torch.testing.assert_close(together.x0[p], alone.x0[0])


def test_a_shared_route_is_the_route_of_every_prompt() -> None:
    x, t = noise(3), descending(1, 6)
    shared = rollout(GAUSSIAN.F, x, t, torch.ones(3), 0.5)
    own = rollout(GAUSSIAN.F, x, t.repeat(3, 1), torch.ones(3), 0.5)
    assert shared.t.shape == (3, 6)
    assert all(torch.equal(getattr(shared, name), getattr(own, name)) for name in ("x", "dxdt", "t", "x0"))


def test_a_rollout_carries_no_graph_and_stays_in_single_precision() -> None:
    weight = torch.ones((), requires_grad=True)
    trajectory = rollout(lambda u, t: (weight * u).bfloat16(), noise(2), descending(2, 3), torch.ones(2), 0.5)
    for tensor in (trajectory.x, trajectory.dxdt, trajectory.x0):
        assert not tensor.requires_grad
        assert tensor.dtype == torch.float32


def test_guidance_extrapolates_from_the_null_prompt() -> None:
    u, t = noise(3), descending(3)
    condition, null = random_condition(3), random_condition(3, seed=9)
    w = torch.tensor([0.0, 1.0, 4.5])
    F = combined(guided(conditional, condition, null)(u, t), w)
    cond, uncond = conditional(u, t, condition).F, conditional(u, t, null).F
    torch.testing.assert_close(F, uncond + w[:, None, None, None] * (cond - uncond))
    torch.testing.assert_close(F[0], uncond[0])
    torch.testing.assert_close(F[1], cond[1])
    assert not torch.allclose(cond, uncond)


def test_embedded_guidance_reaches_the_network_as_it_is() -> None:
    u, t, condition, w = noise(2), descending(2), random_condition(2), torch.tensor([4.0, 5.0])
    assert torch.equal(embedded(conditional, condition, w)(u, t), conditional(u, t, condition, w).F)
    assert not torch.equal(embedded(conditional, condition, w)(u, t), conditional(u, t, condition).F)
