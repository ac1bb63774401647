from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tbcm.method.brightness import keep_mask


def at_distance(mse: float, prompts: int, black: Tensor) -> Tensor:
    """Latents whose mean squared distance from `black` is `mse`, unevenly spread over the elements."""
    direction = torch.randn(prompts, *black.shape, generator=torch.Generator().manual_seed(1), dtype=black.dtype)
    return black + direction * (mse / direction.square().mean((1, 2, 3), keepdim=True)).sqrt()


@pytest.fixture
def black() -> Tensor:
    return torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("threshold", [1.0, 0.25])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_dark_prompts_stay_with_probability_mse_over_threshold(
    fraction: float, threshold: float, black: Tensor
) -> None:
    n = 20_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(2))
    keep = keep_mask(at_distance(fraction * threshold, n, black), black, uniform, threshold)
    assert keep.shape == (n,)
    assert keep.dtype == torch.bool
    deviation = (fraction * (1 - fraction) / n) ** 0.5
    assert abs(keep.double().mean().item() - fraction) < 4 * deviation


def test_prompts_at_or_above_the_threshold_always_stay(black: Tensor) -> None:
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(3))
    uniform[0] = 1 - 2**-24  # the largest draw
    assert keep_mask(at_distance(1.0 + 1e-9, 1000, black), black, uniform).all()
    assert keep_mask(at_distance(7.0, 1000, black), black, uniform).all()


def test_an_all_black_prompt_is_dropped(black: Tensor) -> None:
    uniform = torch.linspace(1e-6, 0.999, 50)
    assert not keep_mask(black.expand(50, -1, -1, -1), black, uniform).any()


def test_a_threshold_of_zero_keeps_everything(black: Tensor) -> None:
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(4))
    for mse in (0.0, 1e-8, 0.5):
        assert keep_mask(at_distance(mse, 50, black), black, uniform, 0.0).all()


def test_the_decision_is_a_function_of_the_prompt_and_its_own_draw(black: Tensor) -> None:
    latents = at_distance(0.5, 100, black)
    uniform = torch.rand(100, generator=torch.Generator().manual_seed(5))
    keep = keep_mask(latents, black, uniform)
    assert torch.equal(keep, keep_mask(latents, black, uniform))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(6))
    assert torch.equal(keep[order], keep_mask(latents[order], black, uniform[order]))
    assert torch.equal(keep, uniform < 0.5)
