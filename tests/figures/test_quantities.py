"""The numbers of the figures against the mathematics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tbcm.config.methods import Route
from tbcm.figures import quantities
from tbcm.figures.brightness import filtered
from tbcm.figures.routes import draw_routes, histogram
from tbcm.method.brightness import keep_mask
from tbcm.method.rollout import rollout
from tbcm.method.trigflow import T_MAX

SIGMA = 0.5
TIMES = torch.tensor([[T_MAX, 1.4, 1.0, 0.5, 0.01]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_forward_equivalent_noise_is_the_noise() -> None:
    x0, z, t = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=1), TIMES.expand(3, -1)
    found = quantities.equivalent_noise(quantities.forward_states(x0, z, t), x0, t)
    torch.testing.assert_close(found, z.double()[:, None].expand_as(found), rtol=0, atol=1e-4)
    torch.testing.assert_close(quantities.cosine(found, z), torch.ones(3, 5, dtype=torch.float64))


def test_backward_equivalent_noise_of_a_gaussian_is_known() -> None:
    """Data N(0, s^2): x_t = x_T sqrt(s^2 cos^2 t + sigma^2 sin^2 t) / sigma along the flow, and x_0 = x_T s / sigma, so
    the equivalent noise is a multiple of the initial one: cosine 1, and the length that these two formulas give."""
    s = 1.3
    fine = torch.linspace(T_MAX, 0, 401)[None, :-1]

    def velocity(u: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None, None]
        variance = (s * torch.cos(t)) ** 2 + (SIGMA * torch.sin(t)) ** 2
        return u * (SIGMA**2 - s**2) * torch.sin(t) * torch.cos(t) / variance

    z = SIGMA * normal(2, 4, 8, 8)
    path = rollout(velocity, z, fine, torch.ones(2), SIGMA)
    found = quantities.equivalent_noise(path.x, path.x0, path.t)
    ones = torch.ones(2, 400, dtype=torch.float64)
    torch.testing.assert_close(quantities.cosine(found, z), ones, rtol=0, atol=1e-3)  # fp32 states over sin t
    t = fine[0].double()
    length = (torch.sqrt((s * torch.cos(t)) ** 2 + (SIGMA * torch.sin(t)) ** 2) - s * torch.cos(t)) / torch.sin(t)
    ratio = found.flatten(2).norm(dim=2)[0] / z[0].double().norm()
    torch.testing.assert_close(ratio[:300], length[:300] / SIGMA, rtol=0, atol=0.03)


def test_backward_equivalent_noise_starts_as_the_noise_and_leaves_it() -> None:
    z, target = SIGMA * normal(2, 4, 8, 8), normal(1, 4, 8, 8, seed=5)

    def velocity(u: Tensor, t: Tensor) -> Tensor:
        """A teacher that pulls towards a mixture of its input and a fixed image."""
        return (u - 2 * torch.cos(t)[:, None, None, None] * target) / 2

    path = rollout(velocity, z, TIMES, torch.ones(2), SIGMA)
    for x0 in (path.x0, quantities.predicted_x0(path)):
        found = quantities.cosine(quantities.equivalent_noise(path.x, x0, path.t), z)
        torch.testing.assert_close(found[:, 0], torch.ones(2, dtype=torch.float64))
        assert bool((found[:, -1] < 0.95).all())


def test_cosine_of_known_angles() -> None:
    a = torch.tensor([[[[[1.0, 0.0]]], [[[1.0, 1.0]]], [[[0.0, 3.0]]], [[[-2.0, 0.0]]]]])
    found = quantities.cosine(a, torch.tensor([[[[5.0, 0.0]]]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, math.sqrt(0.5), 0.0, -1.0]], dtype=torch.float64))


def test_mean_and_spread() -> None:
    mean, spread = quantities.mean_and_spread(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert mean.tolist() == [2, 5] and spread.tolist() == pytest.approx([math.sqrt(2), 0])
    assert quantities.mean_and_spread(torch.tensor([[1.0]]))[1].tolist() == [0]


def test_same_label_share_tells_groups_apart() -> None:
    labels = torch.arange(400) % 4
    apart = normal(400, 2) + 100 * labels[:, None]
    assert quantities.same_label_share(apart, labels) == 1
    assert quantities.same_label_share(normal(400, 2), labels) == pytest.approx(0.25, abs=0.04)


ROUTES = [Route(kind=kind, points=n) for kind in ("random", "logit_normal", "reference") for n in (2, 6, 16)]


@pytest.mark.parametrize("t_max", [T_MAX, 1.45])
@pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r.kind}-{r.points}")
def test_route_density_is_that_of_the_draws(route: Route, t_max: float) -> None:
    """Integrates to one, and a histogram of many draws agrees within five standard errors in every bin."""
    cells = 60_000
    t = (torch.arange(cells, dtype=torch.float64) + 0.5) * t_max / cells
    exact = quantities.route_density(route, t, t_max, SIGMA)
    assert float(exact.sum() * t_max / cells) == pytest.approx(1, abs=1e-3)
    count, bins = 8_000, 30
    drawn, edges = histogram(draw_routes(route, t_max, SIGMA, seed=1, routes=count), t_max, bins)
    assert float((drawn * edges.diff()).sum()) == pytest.approx(1)
    mean = exact.reshape(bins, -1).mean(1)
    share = mean * t_max / bins
    points = count * (route.points - 1)
    # Order statistics of one route repel each other: independent draws bound the variance.
    error = 5 * (share * (1 - share) / points).sqrt() + 2 / points
    assert bool(((drawn * edges.diff() - share).abs() <= error).all())


def test_proposals_are_the_uniform_and_the_logit_normal_law() -> None:
    t = torch.linspace(0.01, 1.5, 50, dtype=torch.float64)
    f, F = quantities.proposal(Route(kind="random"), t, T_MAX, SIGMA)
    np.testing.assert_allclose(f, stats.uniform(0, T_MAX).pdf(t))
    np.testing.assert_allclose(F, stats.uniform(0, T_MAX).cdf(t))
    f, F = quantities.proposal(Route(kind="logit_normal", p_mean=0.2, p_std=1.6), t, T_MAX, SIGMA)
    law = stats.lognorm(s=1.6, scale=math.exp(0.2))  # of sigma_d tan t
    jacobian = SIGMA / torch.cos(t) ** 2
    np.testing.assert_allclose(f, law.pdf(SIGMA * torch.tan(t)) * jacobian.numpy(), rtol=1e-9)
    np.testing.assert_allclose(F, law.cdf(SIGMA * torch.tan(t)), rtol=1e-9)


def test_relative_error() -> None:
    reference = normal(3, 4, 8, 8)
    scale = torch.tensor([1.0, 1.5, 0.0])[:, None, None, None]
    found = quantities.relative_error(scale * reference, reference)
    torch.testing.assert_close(found, torch.tensor([0, 0.5, 1], dtype=torch.float64))


def test_brightness_order_and_probabilities_are_keep_masks() -> None:
    black = normal(4, 8, 8)
    distance = torch.tensor([3.0, 0.25, 0.0, 0.81, 1.21])
    xbar0 = black + distance.sqrt()[:, None, None, None]
    result = filtered(xbar0, black, torch.full((5,), 0.5), threshold=1.0)
    assert result.order.tolist() == [2, 1, 3, 4, 0]
    torch.testing.assert_close(result.mse, distance.sort().values, rtol=1e-4, atol=1e-5)
    assert result.kept.tolist() == [False, False, True, True, True]
    draws = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    kept = torch.stack([keep_mask(xbar0, black, u.expand(5)) for u in draws]).double().mean(0)[result.order]
    torch.testing.assert_close(1 - kept, result.drop.double(), rtol=0, atol=0.03)
    assert quantities.drop_probability(distance, 0.0).tolist() == [0] * 5
