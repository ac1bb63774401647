"""The colours that captions name, and putting them on a mask."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tbcm.icons.dataset import Drawing

FOREGROUNDS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "green": (21, 128, 61),
    "blue": (29, 78, 216),
    "purple": (126, 34, 206),
    "pink": (231, 84, 165),
    "brown": (115, 66, 28),
    "black": (20, 20, 20),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "yellow": (255, 224, 102),
    "light blue": (190, 224, 255),
    "gray": (200, 200, 200),
}
PAIRS = [(fg, bg) for fg in FOREGROUNDS for bg in BACKGROUNDS]
"""All colour pairs; an index into it is what the recipes call a pair."""

JITTER = 10  # of 255: how far a channel strays from the named colour at most

_PALETTE = torch.tensor([[FOREGROUNDS[fg], BACKGROUNDS[bg]] for fg, bg in PAIRS], dtype=torch.float32)


def compose(masks: Tensor, colours: Tensor) -> Tensor:
    """Masks [B, 64, 64] uint8 and colours [B, 2, 3] in [0, 255] (foreground, background) -> uint8 [B, 3, 64, 64]."""
    alpha = masks[:, None].float() / 255
    fg, bg = colours.float()[..., None, None].unbind(1)  # [B, 3, 1, 1] each
    return (bg + alpha * (fg - bg)).round().to(torch.uint8)


def fixed_jitter(entries: Sequence[Drawing]) -> Tensor:
    """[n, pairs, 2, 3] in [-1, 1]: the same for a drawing and a pair in every call, so that latents can be kept."""
    return torch.stack([_jitter(entry.key) for entry in entries])


def _jitter(key: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (len(PAIRS), 2, 3)).astype(np.float32))


def colours_of(pairs: Tensor, jitter: Tensor) -> Tensor:
    """Pairs [B] int64 and jitter [B, 2, 3] in [-1, 1] -> colours [B, 2, 3] in [0, 255]."""
    return (_PALETTE[pairs] + JITTER * jitter).clamp(0, 255)


def random_colours(count: int, generator: torch.Generator) -> Tensor:
    """Colours [count, 2, 3] of pairs and jitter drawn at random."""
    pairs = torch.randint(len(PAIRS), (count,), generator=generator)
    return colours_of(pairs, torch.rand(count, 2, 3, generator=generator) * 2 - 1)
