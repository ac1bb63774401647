"""What the teacher is trained on: latents and text states, computed once, and caption dropout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderDC
from torch import Tensor

from tbcm.emoji.autoencoder import encode
from tbcm.emoji.dataset import EmojiImages
from tbcm.models.text import MiniLMEncoder

TextStates = tuple[Tensor, Tensor]
"""States [B, L, D] fp32 and mask [B, L] bool, True = a token."""


@dataclass(frozen=True)
class Cache:
    """n images: scaled latents [n, C, h, w], text states [n, L, D] (both fp32) and their mask [n, L] (bool)."""

    latents: Tensor
    embeds: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: Tensor) -> Cache:
        return Cache(self.latents[index], self.embeds[index], self.mask[index])

    def to(self, device: str) -> Cache:
        return Cache(self.latents.to(device), self.embeds.to(device), self.mask.to(device))


def make_cache(data: EmojiImages, vae: AutoencoderDC, text: MiniLMEncoder, batch: int = 256) -> Cache:
    """Encodes every image and caption of `data`; lies on the CPU."""
    captions = [entry.caption for entry in data.entries]
    encoded = [text.encode(captions[i : i + batch]) for i in range(0, len(captions), batch)]
    embeds, mask = (torch.cat(parts).cpu() for parts in zip(*encoded, strict=True))
    return Cache(encode(vae, data.images, batch), embeds, mask)


def drop_captions(text: TextStates, null: TextStates, drop: Tensor) -> TextStates:
    """Where `drop` [B] bool, states *and* mask become those of the null prompt ([1, L, D] and [1, L]), so that guidance
    has to use the null prompt's own mask (`null_mask: own`)."""
    return torch.where(drop[:, None, None], null[0], text[0]), torch.where(drop[:, None], null[1], text[1])
