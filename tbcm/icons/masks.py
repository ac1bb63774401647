"""From an Iconify icon to an alpha mask: rendering, telling solid from outline, and finding drawings that are alike."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tbcm.errors import UserError

SIZE = 64  # pixels, both ways
FRAME = 54  # the longer side of a drawing: sets leave margins of their own, which say nothing
STROKE = 8.0  # pixels: no outline's strokes are wider at this size
SOLID_SHARE = 0.37  # of the drawn area that lies in parts wider than `STROKE`; at most that much, and it is an outline
ALIKE = 0.025  # mean difference below which two drawings count as one: 3 % of the tile

Mask = NDArray[np.uint8]
"""[64, 64], 0 = background, 255 = foreground."""


def render(icon: dict[str, Any]) -> Mask | None:
    """The icon's coverage with its drawing centred and `FRAME` pixels long; None for an empty drawing."""
    width, height = icon.get("width", 16), icon.get("height", 16)
    left, top, side = icon.get("left", 0), icon.get("top", 0), max(width, height)
    whole = _rasterise(icon["body"], left - (side - width) / 2, top - (side - height) / 2, side, 2 * SIZE)
    rows, columns = (np.flatnonzero(whole.max(axis=axis) > 24) for axis in (1, 0))
    if not len(rows):
        return None
    scale = side / (2 * SIZE)
    tall, wide = (rows[-1] + 1 - rows[0]) * scale, (columns[-1] + 1 - columns[0]) * scale
    frame = max(tall, wide) * SIZE / FRAME
    x = left - (side - width) / 2 + columns[0] * scale - (frame - wide) / 2
    y = top - (side - height) / 2 + rows[0] * scale - (frame - tall) / 2
    return _rasterise(icon["body"], x, y, frame, SIZE)


def _rasterise(body: str, x: float, y: float, side: float, size: int) -> Mask:
    try:
        import resvg_py  # only the recipe needs it, not those who read an atlas
    except ModuleNotFoundError as error:
        raise UserError("icons: rendering needs the package resvg-py: pip install tbcm[icons]") from error
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
        f'viewBox="{x} {y} {side} {side}" width="{size}" height="{size}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.array(image.convert("RGBA"))[..., 3]


def style_of(mask: Mask) -> str:
    """`solid` or `outline`, by how much of the drawing lies in parts wider than a stroke (its opening with a disk).

    The area over the area with its holes filled would count a paperclip, which has no holes, as solid, and a globe of
    thin lines too. Where an icon's name tells its style, this agrees in 97 % of the cases, that in 90 %.
    """
    from scipy.ndimage import distance_transform_edt  # like the renderer: only the recipe needs it

    drawn = np.pad(mask > 127, 1)
    inside = distance_transform_edt(drawn)
    core = inside > STROKE / 2
    if not core.any():
        return "outline"
    opened = distance_transform_edt(~core)[drawn] <= STROKE / 2
    return "solid" if opened.mean() > SOLID_SHARE else "outline"


def distinct(masks: NDArray[np.uint8], alike: float = ALIKE) -> list[int]:
    """Indices of `masks` [n, 64, 64] with no earlier kept one within a mean difference of `alike` (1 = 255)."""
    kept: list[int] = []
    flat = masks.reshape(len(masks), -1).astype(np.float32) / 255
    for i, mask in enumerate(flat):
        if not kept or np.abs(flat[kept] - mask).mean(axis=1).min() > alike:
            kept.append(i)
    return kept
