"""A plain guided Euler sampler and a sheet of samples: how the recipe lets one see what it has made so far."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from tbcm.icons.autoencoder import decode
from tbcm.icons.caches import TextStates
from tbcm.inference.images import save_png, sheet, to_uint8

GUIDANCE = 2.5
SHIFT = 3.0  # of the steps: s = 3 u/(1 + 2 u) for u even in [0, 1], since at high s it is decided what is drawn


@torch.no_grad()
def guided_euler(
    model: nn.Module, noise: Tensor, text: TextStates, null: TextStates, guidance: float = GUIDANCE, steps: int = 20
) -> Tensor:
    """Integrates dx/ds = v from s = 1, where x is `noise` [B, C, H, W], to s = 0 in shifted steps, with
    v = v_null + guidance (v_text - v_null). `null` holds one prompt, `text` B. Returns scaled latents [B, C, H, W]."""
    count = len(noise)
    embeds = torch.cat([null[0].expand(count, -1, -1), text[0]])
    mask = torch.cat([null[1].expand(count, -1), text[1]])
    even = torch.linspace(1, 0, steps + 1)
    times = SHIFT * even / (1 + (SHIFT - 1) * even)
    x = noise
    for now, then in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        s = torch.full((2 * count,), now, device=noise.device)
        v = model(x.repeat(2, 1, 1, 1), embeds, s, encoder_attention_mask=mask, return_dict=False)[0]
        v_null, v_text = v.chunk(2)
        x = x + (then - now) * (v_null + guidance * (v_text - v_null))
    return x


def preview(
    model: nn.Module, vae: AutoencoderDC, text: TextStates, null: TextStates, captions: list[str], rows: int, path: Path
) -> None:
    """A PNG with `rows` samples of every caption, a column each; the same noise in every call, so that the sheets of
    one run can be compared."""
    shape = (len(captions), vae.config.latent_channels, 8, 8)
    pictures = []
    for seed in range(rows):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(text[0].device)
        pictures.append((str(seed), to_uint8(decode(vae, guided_euler(model, noise, text, null)))))
    save_png(sheet(pictures, captions), path)
