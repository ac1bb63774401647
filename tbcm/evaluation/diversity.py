"""How much of a group of real images a set of samples of it reaches: a student whose samples are all alike reaches
little, however good each of them is."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3


def coverage(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> float:
    """The share of the real rows [n, d] that have a fake row [m, d] no farther away than their own k-th neighbour among
    the real ones (Naeem et al. 2020). n > k."""
    radius = _radius(real, k)
    return (torch.cdist(real, fake).amin(1) <= radius).float().mean().item()


def recall(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> float:
    """The share of the real rows [n, d] that lie no farther from some fake row [m, d] than that one's k-th neighbour
    among the fake ones (Kynkaanniemi et al. 2019). m > k."""
    radius = _radius(fake, k)
    return (torch.cdist(real, fake) <= radius).any(1).float().mean().item()


def _radius(rows: Tensor, k: int) -> Tensor:
    """The distance [n] from each row to its k-th nearest other row."""
    if len(rows) <= k:
        raise ValueError(f"{len(rows)} rows have no {k}-th neighbour")
    return torch.cdist(rows, rows).kthvalue(k + 1, dim=1).values  # the nearest is the row itself
