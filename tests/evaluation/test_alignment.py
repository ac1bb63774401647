from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tbcm.evaluation.alignment import RidgeMap, alignment


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ridge_is_least_squares_with_rows_for_the_penalty() -> None:
    """|XW - Y|^2 + a |W|^2 is the least-squares problem of X over sqrt(a) I and Y over zeros, here of centred rows."""
    x, y, strength = normal(40, 5) + 3, normal(40, 2, seed=1) - 1, 0.7
    centred = x - x.mean(0)
    a = strength * centred.square().sum(0).mean()
    rows = torch.cat([centred, a.sqrt() * torch.eye(5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([y - y.mean(0), torch.zeros(5, 2, dtype=torch.float64)])).solution
    torch.testing.assert_close(RidgeMap.fit(x, y, strength).weight, expected)


def test_ridge_finds_a_linear_map_and_takes_both_means_off() -> None:
    x, weight = normal(200, 4) + 5, normal(4, 3, seed=1)
    fitted = RidgeMap.fit(x, x @ weight + 2, 1e-10)
    unseen = normal(6, 4, seed=2) + 5
    torch.testing.assert_close(fitted.images(unseen), fitted.texts(unseen @ weight + 2), rtol=1e-6, atol=1e-6)


def test_alignment_of_vectors_with_known_angles() -> None:
    """Images along two axes; the third caption lies between its own image and the first, nearer the first."""
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]], dtype=torch.float64)
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]], dtype=torch.float64)
    own, others, top = alignment(images, texts)
    assert own == pytest.approx((1 + 1 + 0.6) / 3)
    assert others == pytest.approx((0.0 + 0.8 + 0.0 + 0.6 + 0.0 + 1.0) / 6)
    assert top == pytest.approx(2 / 3)


def test_equal_captions_are_one() -> None:
    texts = normal(3, 8)[[0, 1, 2, 0]]
    assert alignment(texts + 0, texts)[2] == 1


def test_alignment_refuses_sets_of_different_sizes() -> None:
    with pytest.raises(ValueError, match="N >= 2"):
        alignment(normal(3, 4), normal(2, 4))
