"""A plain guided Euler sampler and a sheet of samples: how the recipe lets one see what it has made so far."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from tbcm.emoji.autoencoder import decode
from tbcm.emoji.cache import Cache, TextStates
from tbcm.images import save_png, sheet, to_uint8

GUIDANCE = 4.0
COLUMNS = 16


@torch.no_grad()
def guided_euler(
    model: nn.Module, noise: Tensor, text: TextStates, null: TextStates, guidance: float = GUIDANCE, steps: int = 20
) -> Tensor:
    """Integrates dx/ds = v from s = 1, where x is `noise` [B, C, H, W], to s = 0 in even steps, with
    v = v_null + guidance (v_text - v_null). `null` holds one prompt, `text` B. Returns scaled latents [B, C, H, W]."""
    count = len(noise)
    embeds = torch.cat([null[0].expand(count, -1, -1), text[0]])
    mask = torch.cat([null[1].expand(count, -1), text[1]])
    x = noise
    for step in range(steps):
        s = torch.full((2 * count,), 1 - step / steps, device=noise.device)
        v = model(x.repeat(2, 1, 1, 1), embeds, s, encoder_attention_mask=mask, return_dict=False)[0]
        v_null, v_text = v.chunk(2)
        x = x - (v_null + guidance * (v_text - v_null)) / steps
    return x


def preview(model: nn.Module, vae: AutoencoderDC, seen: Cache, unseen: Cache, null: TextStates, path: Path) -> None:
    """A PNG with four rows of samples of captions spread over `seen`, then two of `unseen`; the same noise in every
    call, so that sheets of one run can be compared."""
    rows = []
    for name, cache, count in (("seen", seen, 4), ("held out", unseen, 2)):
        chosen = cache[torch.linspace(0, len(cache) - 1, count * COLUMNS).long()]
        noise = torch.randn(chosen.latents.shape, generator=torch.Generator().manual_seed(0)).to(chosen.latents.device)
        latents = guided_euler(model, noise, (chosen.embeds, chosen.mask), null)
        rows += [(name, images) for images in to_uint8(decode(vae, latents)).split(COLUMNS)]
    save_png(sheet(rows), path)
