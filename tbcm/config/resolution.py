"""Sizes of images, in pixels: one, or several of which each step takes one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tbcm.errors import UserError

Size = tuple[int, int]
"""(height, width)."""

MOST_SIZES = 32
"""For each there are compiled blocks, a CUDA graph and a black latent."""

_WRITE = "write a number for squares, [height, width], or a list of these: [[1024, 1024], [832, 1216]]"


def sizes_of(value: Any) -> tuple[Size, ...]:
    """What a configuration says: 1024, [768, 1024], or [[768, 1024], [1024, 768], 1024].

    Raises ValueError, saying what is to be written.
    """
    if _is_number(value):
        return (_size(value),)
    if not isinstance(value, (list, tuple)) or not value or (len(value) != 2 and all(map(_is_number, value))):
        raise ValueError(_WRITE)
    sizes = (_size(value),) if all(map(_is_number, value)) else tuple(map(_size, value))
    if len(set(sizes)) < len(sizes):
        raise ValueError("each size once: they are drawn evenly")
    if len(sizes) > MOST_SIZES:
        raise ValueError(f"at most {MOST_SIZES} sizes: for each there are compiled blocks and a CUDA graph")
    return sizes


def _size(value: Any) -> Size:
    sides = [value, value] if _is_number(value) else value
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(map(_is_number, sides)):
        raise ValueError(_WRITE)
    height, width = (int(side) for side in sides)
    if min(height, width) < 1:
        raise ValueError("sides of at least 1 pixel")
    return height, width


def _is_number(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def parse_size(text: str) -> Size:
    """768x1024 (height x width), or 1024 for a square. Raises UserError."""
    found = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text.strip().lower())
    if not found:
        raise UserError(f"{text!r} is no size: write HEIGHTxWIDTH, such as 768x1024, or 1024 for a square")
    return int(found[1]), int(found[2] or found[1])


def shown_size(size: Size) -> str:
    """The inverse of `parse_size`."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def largest(sizes: Iterable[Size]) -> Size:
    """That of most pixels."""
    return max(sizes, key=lambda size: size[0] * size[1])
