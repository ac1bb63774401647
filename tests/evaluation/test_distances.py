from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tbcm.evaluation import distances
from tbcm.evaluation.distances import fid, kid, split


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kid_by_loops(x: Tensor, y: Tensor) -> float:
    """The estimator as Binkowski et al. print it, a pair at a time."""

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    total = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    total += sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return total - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def sample_with(mean: list[float], covariance: list[list[float]], n: int, seed: int) -> Tensor:
    """Rows whose sample mean and covariance are exactly these."""
    z = normal(n, len(mean), seed=seed)
    z = z - z.mean(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
    colouring = torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)).T
    return z @ whitening @ colouring + torch.tensor(mean, dtype=torch.float64)


@pytest.mark.parametrize(("n", "m", "d"), [(2, 2, 1), (7, 5, 3), (4, 9, 20)])
def test_kid_equals_the_double_loop(n: int, m: int, d: int) -> None:
    x, y = normal(n, d), normal(m, d, seed=1) + 0.5
    assert kid(x, y) == pytest.approx(kid_by_loops(x, y), rel=1e-10)


def test_kid_of_a_set_with_itself_is_slightly_negative() -> None:
    """The cross term keeps the pairs (i, i), which the unbiased within terms leave out."""
    x = normal(6, 4)
    assert kid(x, x) == pytest.approx(kid_by_loops(x, x), rel=1e-10)
    assert kid(x, x) < 0


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_kid_is_unbiased(shift: float) -> None:
    """Mean over many small samples against the closed form for N(0, 1) and N(m, 1).

    With k = (ab + 1)^3 = (ab)^3 + 3 (ab)^2 + 3 ab + 1 and moments (0, 1, 0) and (m, 1 + m^2, m^3 + 3 m).
    """
    m = shift
    within_y = (m**3 + 3 * m) ** 2 + 3 * (1 + m**2) ** 2 + 3 * m**2 + 1
    expected = 4 + within_y - 2 * (3 * (1 + m**2) + 1)
    values = [kid(normal(20, 1, seed=i), normal(30, 1, seed=10_000 + i) + m) for i in range(1500)]
    standard_error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values) - expected) < 4 * standard_error
    assert standard_error < 0.03 * max(expected, 10)


def test_fid_closed_form_for_covariances_that_do_not_commute() -> None:
    """In two dimensions tr((ST)^(1/2)) = sqrt(tr(ST) + 2 sqrt(det(ST)))."""
    s, t = [[2.0, 0.9], [0.9, 1.0]], [[1.0, -0.7], [-0.7, 3.0]]
    product = torch.tensor(s, dtype=torch.float64) @ torch.tensor(t, dtype=torch.float64)
    cross = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.det(product))))
    expected = (1.0**2 + 2.0**2) + (2.0 + 1.0) + (1.0 + 3.0) - 2 * cross
    assert fid(sample_with([0, 0], s, 50, seed=0), sample_with([1, 2], t, 80, seed=1)) == pytest.approx(expected, 1e-9)


def test_fid_of_fewer_samples_than_dimensions() -> None:
    """Two points each: covariances aa' and bb' of rank one, so that tr((aa' bb')^(1/2)) = |a.b|."""
    a, b = normal(5), normal(5, seed=1)
    x, y = torch.stack([a, -a]) / math.sqrt(2), torch.stack([b, -b]) / math.sqrt(2) + 3.0
    expected = 5 * 3.0**2 + float(a @ a + b @ b - 2 * (a @ b).abs())
    assert fid(x, y) == pytest.approx(expected, 1e-9)


def test_fid_approaches_the_closed_form_of_the_distributions() -> None:
    """N(0, I) and N(1, 4 I) in d dimensions are d (1 + (2 - 1)^2) apart; the bias vanishes with the sample size."""
    d = 4
    error = [fid(normal(n, d), 2 * normal(n, d, seed=1) + 1) - 2 * d for n in (100, 200_000)]
    assert abs(error[1]) < 0.05 < abs(error[0])


@pytest.mark.parametrize("n", [30, 3])
def test_fid_of_identical_sets_is_zero(n: int) -> None:
    x = normal(n, 10)
    assert abs(fid(x, x)) < 1e-10


@pytest.mark.parametrize("distance", [kid, fid])
def test_distances_do_not_depend_on_order_and_are_symmetric(distance: Callable[[Tensor, Tensor], float]) -> None:
    x, y = normal(20, 6), normal(15, 6, seed=1) + 1
    value = distance(x, y)
    assert distance(x.flip(0), y[torch.randperm(15)]) == pytest.approx(value, rel=1e-9)
    assert distance(y, x) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("distance", [kid, fid])
def test_distances_refuse_what_is_not_two_sets(distance: Callable[[Tensor, Tensor], float]) -> None:
    for x, y in [((1, 4), (5, 4)), ((5, 4), (5, 3)), ((5,), (5,))]:
        with pytest.raises(ValueError, match=r"\[N, d\] and \[M, d\]"):
            distance(normal(*x), normal(*y))


def test_split_is_disjoint_and_seeded() -> None:
    x = torch.arange(11)[:, None]
    a, b = split(x, 5, seed=1)
    assert len(set(a.flatten().tolist()) | set(b.flatten().tolist())) == 10
    assert torch.equal(a, split(x, 5, seed=1)[0])
    assert not torch.equal(a, split(x, 5, seed=2)[0])
    with pytest.raises(ValueError, match="at most 5"):
        split(x, 6)


def test_kid_is_summed_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_ROWS", 3)
    x, y = normal(8, 4), normal(7, 4, seed=1)
    assert kid(x, y) == pytest.approx(kid_by_loops(x, y), rel=1e-10)
