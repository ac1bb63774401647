from __future__ import annotations

import pytest
import torch

from tbcm.evaluation.diversity import coverage, recall


def line(*places: float) -> torch.Tensor:
    return torch.tensor(places, dtype=torch.float32)[:, None]


def test_by_hand_on_a_line() -> None:
    """Real points at 0, 1, 2 and 10: to the nearest other one it is 1, 1, 1 and 8."""
    real = line(0, 1, 2, 10)
    assert coverage(real, line(0.4), k=1) == pytest.approx(2 / 4)  # reaches 0 and 1, is 1.6 from 2
    assert coverage(real, line(1, 5), k=1) == pytest.approx(4 / 4)
    fake = line(0, 0.5, 9)  # their nearest others are 0.5, 0.5 and 8.5 away
    assert recall(real, fake, k=1) == pytest.approx(4 / 4)
    assert recall(real, line(0, 0.5), k=1) == pytest.approx(2 / 4)  # 0 and 1


def test_collapse_costs_both_and_real_ones_reach_most() -> None:
    generator = torch.Generator().manual_seed(0)
    real, other = torch.randn(2, 60, 4, generator=generator)
    collapsed = real[:1] + 1e-3 * torch.randn(60, 4, generator=generator)
    for measure in (coverage, recall):
        assert measure(real, other) > 0.7
        assert measure(real, collapsed) < 0.2


def test_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows have no 3-th neighbour"):
        coverage(line(0, 1, 2), line(0))
