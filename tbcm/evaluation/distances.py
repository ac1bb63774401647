"""Distances between sets of features: KID and FID. What the features are of is the caller's choice, and decides with
what a value may be compared."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 2048  # of a kernel matrix at once: with 30,000 columns half a gigabyte


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel inception distance: the unbiased squared MMD with the kernel (a.b/d + 1)^3 (Binkowski et al. 2018, Eq. 4).

    Its expectation is zero for two independent samples of one distribution, at any size, so single values may be
    negative. For sets that share their captions, such as a student's and its teacher's, it is zero only approximately,
    as these are not independent: -0.11e-3 was measured at n = 2,000. Not scaled: tables conventionally show 1,000 times
    this value and say so ("KID x 1e3").

    Args:
        x, y: features [N, d] and [M, d], N, M >= 2. Kernel matrices are summed 2,048 rows at a time.
    """
    _require_sets(x, y)
    x, y = x.double(), y.double()  # the kernel's values grow with the cube of features near 1e2
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x) - _diagonal_sum(x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _diagonal_sum(y)) / (m * (m - 1))
    return (within_x + within_y - 2 * _kernel_sum(x, y) / (n * m)).item()


def fid(x: Tensor, y: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two feature sets, in float64 (Heusel et al. 2017, Eq. 6).

    |mu_x - mu_y|^2 + tr(S_x) + tr(S_y) - 2 tr((S_x S_y)^(1/2)). With centred features S_x = A'A and S_y = B'B, the
    last trace is the nuclear norm of A B', which is exact and real also where the covariances are singular (N < d).
    Biased upwards, the more so the smaller the sets: compare at equal N only, and beside the floor at that N.

    Args:
        x, y: features [N, d] and [M, d], N, M >= 2.
    """
    _require_sets(x, y)
    x, y = x.double(), y.double()
    a, b = _covariance_factor(x), _covariance_factor(y)
    mean_term = (x.mean(0) - y.mean(0)).square().sum()
    cross = torch.linalg.matrix_norm(a @ b.T, ord="nuc")
    return (mean_term + a.square().sum() + b.square().sum() - 2 * cross).item()


def split(x: Tensor, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two disjoint random subsets of `size` rows each: what to compare for the real-versus-real floor of a metric.

    Raises:
        ValueError: x has fewer than 2 `size` rows.
    """
    if not 1 <= size <= len(x) // 2:
        raise ValueError(f"size is {size}; two disjoint subsets of {len(x)} rows have at most {len(x) // 2} each")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    return x[order[:size]], x[order[size : 2 * size]]


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    """The sum over all of k(a, b) [N, M]."""
    return torch.stack([_kernel(rows, b).sum() for rows in a.split(_ROWS)]).sum()


def _diagonal_sum(x: Tensor) -> Tensor:
    return ((x.square().sum(1) / x.shape[1] + 1) ** 3).sum()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _covariance_factor(x: Tensor) -> Tensor:
    """A [min(N, d), d] with A'A = the covariance of the rows of x [N, d]."""
    a = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return torch.linalg.qr(a, mode="r").R if len(a) > a.shape[1] else a


def _require_sets(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"give features [N, d] and [M, d], N, M >= 2, not {list(x.shape)} and {list(y.shape)}")
