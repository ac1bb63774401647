"""Distribution matching distillation (DMD2: Yin et al. 2024, arXiv 2405.14867), in TrigFlow.

A sample x of the student is noised to x_s, and two networks say what data it came from: the guided teacher, of the real
distribution, and a second one, of the student's own. Their scores are the gradient of KL(student_s || real_s),

    score_student(x_s) - score_real(x_s) = cos(s) / (sigma_d sin(s))^2 (x^_student - x^_real),
    x^ = cos(s) x_s - sin(s) sigma_d F(x_s / sigma_d, s),

of which the method takes the direction, with a length of its own for each sample (DMD: arXiv 2311.18828, Eq. 8):

    g = (x^_student - x^_real) / mean |x - x^_real|,        loss = 1/2 mean (x - stopgrad(x - g))^2.

The second network follows the student: it is trained on its samples as the teacher was on data (flow matching), several
times for each update of the student. A student for n steps is trained where sampling leads it (backward simulation).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tbcm.method.rollout import Velocity
from tbcm.method.trigflow import per_sample, renoise, rotate

_LEAST = 1e-8
"""Of the length by which g is divided."""


def matching_gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """g [P, C, H, W] at samples x, where the teacher sees the data `real` and the second network `fake`."""
    length = (x - real).abs().flatten(1).mean(1).clamp(min=_LEAST)
    return (fake - real) / per_sample(length, x)


def matching_loss(x: Tensor, gradient: Tensor, sigma_data: float, count: int) -> Tensor:
    """1/2 mean (u - stopgrad(u - g))^2 of u = x / sigma_d, whose gradient to u is g over the number of elements. The
    sum over samples is divided by `count`, those of the whole step."""
    u = x / sigma_data
    return 0.5 * (u - (u - gradient).detach()).square().flatten(1).mean(1).sum() / count


def velocity_loss(F: Tensor, x0: Tensor, z: Tensor, s: Tensor, sigma_data: float, count: int) -> Tensor:
    """How far F [P, C, H, W] is from the velocity (cos(s) z - sin(s) x_0) / sigma_d of x_s = cos(s) x_0 + sin(s) z:
    mean squares. Least where F is the velocity of the distribution of x_0; `count` as above."""
    s = per_sample(s, x0)
    wanted = (torch.cos(s) * z - torch.sin(s) * x0) / sigma_data
    return (F.float() - wanted).square().flatten(1).mean(1).sum() / count


def simulated(
    velocity: Velocity, noise: Tensor, times: Sequence[float], stage: int, sigma_data: float, fresh: Sequence[Tensor]
) -> Tensor:
    """The student's sample x_0 [P, C, H, W] at the `stage`-th of its sampling `times`, counted from 0, with the graph
    of that answer alone: the steps before lead there as `sampling.consistency_sample` does.

    `noise` ~ N(0, sigma_d^2); `fresh`: for each step before, such noise to go on with.
    """
    x = noise
    for i in range(stage + 1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == stage):
            t = torch.full(x.shape[:1], times[i], dtype=torch.float32, device=x.device)
            x = rotate(x, sigma_data * velocity(x / sigma_data, t).float(), t)
            if i < stage:
                x = renoise(x, fresh[i], torch.full_like(t, times[i + 1]))
    return x
