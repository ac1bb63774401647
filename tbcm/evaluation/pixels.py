"""Reading an icon off its pixels: which colours it has, and its drawing as an alpha mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tbcm.icons.colours import BACKGROUNDS, FOREGROUNDS
from tbcm.icons.masks import style_of

_MARGIN = 3  # pixels along the border, which no drawing reaches
_INK = 0.1  # share of the pixels, those farthest from the background, that tell the foreground


@dataclass(frozen=True)
class Reading:
    """Of n images: the nearest named colours, the styles, and masks [n, H, W] uint8 (255 = foreground)."""

    foregrounds: list[str]
    backgrounds: list[str]
    styles: list[str]
    masks: Tensor


def read_icons(images: Tensor) -> Reading:
    """Images [n, 3, H, W] uint8. The background is the median along the border, the foreground the median of the pixels
    farthest from it, and the mask is where between the two a pixel lies."""
    pixels = images.float()
    bg = _border(pixels).median(dim=2).values  # [n, 3]
    away = (pixels - bg[..., None, None]).square().sum(1).flatten(1)  # [n, H * W]
    farthest = away.topk(max(1, int(_INK * away.shape[1])), dim=1).indices
    fg = pixels.flatten(2).gather(2, farthest[:, None].expand(-1, 3, -1)).median(dim=2).values
    axis = fg - bg
    along = ((pixels - bg[..., None, None]) * axis[..., None, None]).sum(1)
    alpha = along / axis.square().sum(1).clamp(min=1)[:, None, None]
    masks = (255 * alpha.clamp(0, 1)).round().to(torch.uint8)
    styles = [style_of(mask) for mask in masks.numpy()]
    return Reading(nearest(fg, FOREGROUNDS), nearest(bg, BACKGROUNDS), styles, masks)


def nearest(colours: Tensor, named: dict[str, tuple[int, int, int]]) -> list[str]:
    """The name of the nearest colour to each of `colours` [n, 3]."""
    names = list(named)
    closest = torch.cdist(colours, torch.tensor([named[name] for name in names]).float()).argmin(1)
    return [names[i] for i in closest.tolist()]


def _border(pixels: Tensor) -> Tensor:
    """[n, 3, H, W] -> [n, 3, pixels of the border]."""
    m = _MARGIN
    sides = pixels[..., :m, :], pixels[..., -m:, :], pixels[..., m:-m, :m], pixels[..., m:-m, -m:]
    return torch.cat([side.flatten(2) for side in sides], dim=2)
