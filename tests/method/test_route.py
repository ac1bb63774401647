from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import beta, kstest, norm
from torch import Tensor

from tbcm.method.route import logit_normal_route, random_route, reference_edges, reference_route

HALF_PI = math.pi / 2
GOLDEN_16 = [
    *(1.5708, 1.5423, 1.5095, 1.4714, 1.4268, 1.3741, 1.3112, 1.2356),
    *(1.1440, 1.0331, 0.8997, 0.7425, 0.5642, 0.3734, 0.1832, 0.0063),
]
SCHEMES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "random": random_route,
    "logit_normal": lambda draw, t_max: logit_normal_route(draw, t_max, sigma_data=0.5),
    "reference": reference_route,
}


def draws(scheme: str, routes: int, points: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn if scheme == "logit_normal" else torch.rand
    return sample(routes, points, generator=generator)


def test_reference_edges_are_the_published_ones() -> None:
    torch.testing.assert_close(
        reference_edges(16), torch.tensor(GOLDEN_16, dtype=torch.float64), rtol=0, atol=5e-5 + 1e-12
    )


@pytest.mark.parametrize(("points", "shift", "steps"), [(4, 2.5, 1000), (28, 3.0, 1000), (8, 1.0, 100)])
def test_reference_edges_are_a_flow_euler_schedule_shifted_twice(points: int, shift: float, steps: int) -> None:
    def shifted(q: float) -> float:
        return shift * q / (1 + (shift - 1) * q)

    lowest = shifted(1 / steps)  # the last training time, once shifted
    for i, edge in enumerate(reference_edges(points, shift=shift, train_timesteps=steps).tolist()):
        s = shifted(1 + (lowest - 1) * i / (points - 1))
        assert math.sin(edge) * (1 - s) == pytest.approx(math.cos(edge) * s, abs=1e-12)  # tan t = s / (1 - s)


@pytest.mark.parametrize("t_max", [HALF_PI, 1.5645, 1.0])
@pytest.mark.parametrize("points", [2, 16])
def test_reference_route_visits_every_bin_once(points: int, t_max: float) -> None:
    t = reference_route(draws("reference", 500, points), t_max).double()
    edges = reference_edges(points) * t_max / HALF_PI
    assert ((t[:, 1:] <= edges[:-1] + 1e-6) & (t[:, 1:] >= edges[1:] - 1e-6)).all()


@pytest.mark.parametrize("t_max", [HALF_PI, 1.5645, 1.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_route_descends_from_t_max_and_stays_positive(scheme: str, t_max: float) -> None:
    t = SCHEMES[scheme](draws(scheme, 1000, 16), t_max)
    assert t.shape == (1000, 16)
    assert t.dtype == torch.float32
    assert (t[:, 0] == torch.tensor(t_max, dtype=torch.float32)).all()
    assert (t > 0).all()
    assert (t[:, 1:] < t[:, :-1]).all()


@pytest.mark.parametrize("scheme", ["random", "reference"])
def test_the_extreme_draws_of_a_uniform_generator_are_no_exception(scheme: str) -> None:
    """torch.rand returns 0 once in 2^24 draws; a time of 0 would have an infinite weight."""
    lowest, highest = torch.zeros(1, 4), torch.full((1, 4), 1 - 2**-24)
    for draw in (lowest, highest):
        t = SCHEMES[scheme](draw, HALF_PI)
        assert (t > 0).all()
        assert (t <= torch.tensor(HALF_PI)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_depends_on_its_own_draws_only(scheme: str) -> None:
    draw = draws(scheme, 5, 8)
    together = SCHEMES[scheme](draw, HALF_PI)
    alone = torch.cat([SCHEMES[scheme](row[None], HALF_PI) for row in draw])
    assert torch.equal(together, alone)
    assert len(together[:, 1].unique()) == 5


@pytest.mark.parametrize("t_max", [HALF_PI, 1.2])
@pytest.mark.parametrize("column", [1, 2, 3])
def test_random_routes_are_order_statistics_of_uniform_draws(column: int, t_max: float) -> None:
    """Of N independent draws with distribution function P, the k-th smallest has P(t) ~ Beta(k, N + 1 - k)."""
    t = random_route(draws("random", 4000, 4, seed=column), t_max)[:, column]
    assert kstest(t.double() / t_max, beta(4 - column, column + 1).cdf).pvalue > 0.01


@pytest.mark.parametrize("t_max", [HALF_PI, 1.2])
@pytest.mark.parametrize(("sigma_data", "mean", "std"), [(0.5, 0.2, 1.6), (1.0, -0.8, 1.0)])
@pytest.mark.parametrize("column", [1, 2, 3])
def test_logit_normal_routes_are_order_statistics_of_their_proposal(
    column: int, sigma_data: float, mean: float, std: float, t_max: float
) -> None:
    """The proposal is given that t <= t_max: a teacher that starts below pi/2 has nothing to say beyond."""
    draw = draws("logit_normal", 4000, 4, seed=column)
    t = logit_normal_route(draw, t_max, sigma_data=sigma_data, mean=mean, std=std)[:, column].double()
    proposal = norm(mean, std).cdf
    fraction = proposal(torch.log(sigma_data * torch.tan(t))) / proposal(math.log(sigma_data * math.tan(t_max)))
    assert kstest(fraction, beta(4 - column, column + 1).cdf).pvalue > 0.01


def test_reference_routes_are_uniform_within_a_bin() -> None:
    t, edges = reference_route(draws("reference", 4000, 4), HALF_PI).double(), reference_edges(4)
    for i in range(1, 4):
        within = (t[:, i] - edges[i]) / (edges[i - 1] - edges[i])
        assert kstest(within, "uniform").pvalue > 0.01
