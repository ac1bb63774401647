"""A plain guided Euler sampler, for looking at a teacher; what trains and samples in earnest is `tbcm.method`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderDC
from PIL import Image
from torch import Tensor, nn

from tbcm.emoji.autoencoder import decode
from tbcm.runtime.files import atomic_path

if TYPE_CHECKING:
    from tbcm.emoji.teacher import Cache


@torch.no_grad()
def guided_euler(
    model: nn.Module,
    noise: Tensor,
    text: tuple[Tensor, Tensor],
    null: tuple[Tensor, Tensor],
    guidance: float = 4.0,
    steps: int = 20,
    shift: float = 1.0,
) -> Tensor:
    """Integrates dx/ds = v from s = 1 (noise [B, C, H, W]) to 0; text and null are states [B or 1, L, D] and mask
    [B or 1, L]. v = v_null + guidance (v_text - v_null). Times are shift q/(1 + (shift - 1) q), q even on [0, 1].
    Returns scaled latents [B, C, H, W]."""
    count = len(noise)
    embeds = torch.cat([null[0].expand(count, -1, -1), text[0].expand(count, -1, -1)])
    mask = torch.cat([null[1].expand(count, -1), text[1].expand(count, -1)])
    q = torch.linspace(1, 0, steps + 1, device=noise.device)
    times = shift * q / (1 + (shift - 1) * q)
    x = noise
    for now, after in zip(times[:-1], times[1:], strict=True):
        s = now.expand(2 * count)
        v_null, v_text = model(x.repeat(2, 1, 1, 1), embeds, s, encoder_attention_mask=mask, return_dict=False)[0].chunk(2)
        x = x + (after - now) * (v_null + guidance * (v_text - v_null))
    return x


def save_grid(images: Tensor, path: Path, columns: int = 16) -> None:
    """Images [n, 3, H, W] in [-1, 1] as one PNG, row by row; n is a multiple of `columns`."""
    count, _, height, width = images.shape
    rows = count // columns
    grid = images.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    with atomic_path(path) as temporary:
        Image.fromarray(grid.add(1).mul(127.5).round().byte().numpy()).save(temporary, format="PNG")


def preview(
    model: nn.Module, vae: AutoencoderDC, seen: Cache, unseen: Cache, null: tuple[Tensor, Tensor], path: Path
) -> None:
    """64 samples of captions spread over `seen`, then 64 of `unseen`, always from the same noise."""
    parts = []
    for cache in (seen, unseen):
        chosen = torch.linspace(0, len(cache.latents) - 1, 64).long()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(64, *cache.latents.shape[1:], generator=generator).to(cache.latents.device)
        parts.append(guided_euler(model, noise, (cache.embeds[chosen], cache.mask[chosen]), null))
    save_grid(decode(vae, torch.cat(parts)), path)
