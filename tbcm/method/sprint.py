"""Sana-Sprint's adversarial term (Chen et al. 2025, arXiv 2503.09641), added to sCM's loss (`tbcm.method.scm`).

Latent adversarial distillation (LADD: Sauer et al. 2024, arXiv 2403.12015): what the student makes of noised data,

    fake = f(x_t, t) = cos(t) x_t - sin(t) sigma_d F_theta(x_t / sigma_d, t),    x_t = cos(t) x_0 + sin(t) z,

and the data x_0 itself, `real`, are noised again, each to a time s of its own, and a discriminator scores features that
the frozen teacher has of them. Hinge loss: the student raises its fakes' scores, the discriminator tells them from real
ones. Of the times t a share is t_max, where one-step generation starts.

Where this departs from the released trainer: docs/recipe.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tbcm.method.route import logit_normal_times


def adversarial_times(
    normal: Tensor, uniform: Tensor, t_max: float, *, share: float, sigma_data: float, mean: float, std: float
) -> Tensor:
    """Where the student is judged, [P] radians: t_max with probability `share`, else logit-normal times.

    `normal` [P] and `uniform` [P] are standard draws; `mean` and `std` are sCM's proposal's.
    """
    t = logit_normal_times(normal, t_max, sigma_data=sigma_data, mean=mean, std=std)
    return torch.where(uniform < share, t_max, t)


def student_loss(fake: Tensor, count: int, keep: Tensor | None = None) -> Tensor:
    """-mean of the scores [P, K] of fakes; the sum over samples is divided by `count`, those of the whole step. `keep`
    [P]: which of them count."""
    return -mean_score(fake, count, keep)


def discriminator_loss(real: Tensor, fake: Tensor, count: int, keep: Tensor | None = None) -> Tensor:
    """Half the sum of mean max(0, 1 - real) and mean max(0, 1 + fake), of scores [P, K], with `count` and `keep` as
    above."""
    return 0.5 * mean_score(functional.relu(1 - real) + functional.relu(1 + fake), count, keep)


def mean_score(scores: Tensor, count: int, keep: Tensor | None = None) -> Tensor:
    """Of [P, K], as above."""
    means = scores.mean(1)
    return (means if keep is None else torch.where(keep, means, 0.0)).sum() / count
