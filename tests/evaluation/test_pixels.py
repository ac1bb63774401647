from __future__ import annotations

import pytest
import torch

from tbcm.evaluation.pixels import nearest, read_icons
from tbcm.icons.colours import BACKGROUNDS, FOREGROUNDS, PAIRS, colours_of, compose


@pytest.fixture
def masks() -> torch.Tensor:
    """A disk and a frame."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    radius = ((x - 31.5) ** 2 + (y - 31.5) ** 2).sqrt()
    inside = ((x - 31.5).abs() < 25) & ((y - 31.5).abs() < 25)
    frame = inside & ~(((x - 31.5).abs() < 21) & ((y - 31.5).abs() < 21))
    return torch.stack([255 * (radius < 20), 255 * frame]).to(torch.uint8)


def test_every_colour_pair_is_read_with_noise_and_jitter(masks: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.arange(len(PAIRS)).repeat_interleave(2)
    jitter = torch.rand(len(pairs), 2, 3, generator=generator) * 2 - 1
    images = compose(masks.repeat(len(PAIRS), 1, 1), colours_of(pairs, jitter))
    noise = 4 * torch.randn(images.shape, generator=generator)
    reading = read_icons((images + noise).clamp(0, 255).to(torch.uint8))
    assert list(zip(reading.foregrounds, reading.backgrounds, strict=True)) == [PAIRS[i] for i in pairs.tolist()]
    assert reading.styles == ["solid", "outline"] * len(PAIRS)
    assert ((reading.masks > 127) == (masks.repeat(len(PAIRS), 1, 1) > 127)).float().mean() > 0.99


def test_an_empty_image_is_read_without_harm() -> None:
    reading = read_icons(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))
    assert reading.backgrounds == ["white"] and reading.styles == ["outline"] and reading.masks.max() == 0


def test_nearest_names() -> None:
    red, gray = torch.tensor([[200.0, 50, 40]]), torch.tensor([[190.0, 190, 200]])
    assert nearest(red, FOREGROUNDS) == ["red"] and nearest(gray, BACKGROUNDS) == ["gray"]
