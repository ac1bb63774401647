from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbcm.emoji.autoencoder import encode, make_autoencoder
from tbcm.emoji.cache import drop_captions, make_cache
from tbcm.emoji.dataset import load_images


def test_dropout_replaces_states_and_mask_together() -> None:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(4, 3, 5, generator=generator)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]]).bool()
    null = (torch.randn(1, 3, 5, generator=generator), torch.tensor([[True, False, False]]))
    dropped, dropped_mask = drop_captions((embeds, mask), null, torch.tensor([True, False, False, True]))
    for i, is_dropped in enumerate((True, False, False, True)):
        assert torch.equal(dropped[i], null[0][0] if is_dropped else embeds[i])
        assert torch.equal(dropped_mask[i], null[1][0] if is_dropped else mask[i])


def test_cache_has_a_row_for_each_image_in_order(data: Path) -> None:
    class Lengths:
        """A text encoder whose only state is the length of the prompt."""

        def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
            lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
            return lengths[:, None, None].expand(-1, 2, 1), torch.ones(len(prompts), 2, dtype=torch.bool)

    images, vae = load_images(data), make_autoencoder().eval()
    text: Any = Lengths()
    cache = make_cache(images, vae, text, batch=5)
    assert cache.embeds[:, 0, 0].tolist() == [len(entry.caption) for entry in images.entries]
    assert cache.mask.shape == (16, 2) and len(cache) == 16
    torch.testing.assert_close(cache.latents, encode(vae, images.images))
    torch.testing.assert_close(cache[torch.tensor([3, 1])].latents, cache.latents[[3, 1]])
