from __future__ import annotations

import math

import pytest
import torch
from helpers import Gaussian, random_condition
from torch import Tensor, nn

from tbcm.method.rollout import rollout
from tbcm.method.tbcm import first_training_point, tbcm_loss
from tbcm.method.types import Condition, Prediction, Trajectory

PROMPTS, POINTS, SIGMA = 3, 4, 0.5
GAUSSIAN = Gaussian(mean=0.2, std=0.3, sigma_data=SIGMA)


class Student(nn.Module):
    """F = tanh(a u) + b t w + c text with logvar = d t, and what it was asked with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.7, 0.3, 0.2, 0.1]))

    def forward(
        self,
        u: Tensor,
        t: Tensor,
        condition: Condition,
        guidance: Tensor | None = None,
        tangents: tuple[Tensor, Tensor] | None = None,
    ) -> Prediction:
        a, b, c, d = self.weights
        assert guidance is not None
        assert tangents is not None
        n = u.shape[0] // len(condition)
        text = condition.tensors["embeds"].mean((1, 2)).repeat_interleave(n)
        F = torch.tanh(a * u) + (b * t * guidance + c * text)[:, None, None, None]
        du, dt = tangents
        dF = a * (1 - torch.tanh(a * u) ** 2) * du + (b * guidance * dt)[:, None, None, None]
        return Prediction(F, dF.detach(), d * t)


def trajectory() -> Trajectory:
    noise = SIGMA * torch.randn(PROMPTS, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([[1.5, 1.2, 0.8, 0.3], [1.4, 1.0, 0.5, 0.1], [1.3, 1.1, 0.9, 0.2]])
    return rollout(GAUSSIAN.F, noise, t, torch.tensor([4.0, 4.5, 5.0]), SIGMA)


def test_the_loss_is_algorithm_1_sample_by_sample() -> None:
    path, condition, keep, r = trajectory(), random_condition(PROMPTS), torch.tensor([True, False, True]), 0.75
    student = Student()
    a, b, c, d = student.weights.tolist()
    loss, figures = tbcm_loss(student, path, condition, keep, count=99, r=r, sigma_data=SIGMA)
    total = 0.0
    for p in range(PROMPTS):
        text = condition.tensors["embeds"][p].mean()
        for i in range(POINTS):
            x, v, t, w = path.x[p, i], path.dxdt[p, i], path.t[p, i], path.guidance[p]
            F = torch.tanh(a * x / SIGMA) + b * t * w + c * text
            dFdt = a * (1 - torch.tanh(a * x / SIGMA) ** 2) * v / SIGMA + b * w
            g = -(t.cos() ** 2) * (SIGMA * F - v) - r * t.cos() * t.sin() * (x + SIGMA * dFdt)
            norm = g.square().sum().sqrt()
            sample = p * POINTS + i  # prompt-major
            assert figures["g_norm"][sample].item() == pytest.approx(norm.item(), rel=1e-5)
            assert figures["t"][sample] == t
            assert figures["keep"][sample] == keep[p]
            if keep[p]:
                error = (g / (norm + 0.1)).square().mean()
                assert figures["error"][sample].item() == pytest.approx(error.item(), rel=1e-5)
                weight = 1 / (SIGMA * t.tan())
                logvar = d * t + (weight / g.numel()).log()  # learned, on top of where it starts
                assert figures["logvar"][sample].item() == pytest.approx(logvar.item(), rel=1e-5)
                total += (weight * (-logvar).exp() * error + logvar).item()
    assert loss.item() == pytest.approx(total / 99, rel=1e-5)
    assert not any(figure.requires_grad for figure in figures.values())


def test_micro_batches_of_prompts_or_of_points_add_up_to_the_whole() -> None:
    path, condition, keep = trajectory(), random_condition(PROMPTS), torch.tensor([True, False, True])

    def gradient(parts: list[tuple[slice, slice]]) -> Tensor:
        student = Student()
        for prompts, points in parts:
            part = Trajectory(
                path.x[prompts], path.dxdt[prompts], path.t[prompts], path.x0[prompts], path.guidance[prompts]
            )
            options = {"count": PROMPTS * POINTS, "r": 1.0, "sigma_data": SIGMA}
            tbcm_loss(student, part.points(points), condition[prompts], keep[prompts], **options)[0].backward()
        return student.weights.grad

    everything = slice(None)
    whole = gradient([(everything, everything)])
    assert (whole != 0).all()
    torch.testing.assert_close(gradient([(slice(p, p + 1), everything) for p in range(PROMPTS)]), whole)
    torch.testing.assert_close(gradient([(everything, slice(0, 1)), (everything, slice(1, None))]), whole)


@pytest.mark.parametrize(("t_max", "first"), [(math.pi / 2, 1), (1.5645, 0), (1.0, 0)])
def test_the_first_point_trains_only_below_pi_over_two(t_max: float, first: int) -> None:
    assert first_training_point(t_max) == first
