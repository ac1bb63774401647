"""Decoded images: to bytes, to PNG files, to labelled sheets for the eye."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tbcm.errors import UserError
from tbcm.runtime.files import atomic_path

_MIN_CELL = 96  # smaller images are enlarged on a sheet, to be seen and to have room for a caption
_MAX_CELL = 320  # larger ones are reduced, or a sheet of 1024 px images would have 30 megapixels
_GAP = 6
_FONT_SIZE = 14
_MAX_LINES = 3
_MAX_LABEL_WIDTH = 160
_PAPER, _INK = "white", "black"

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_uint8(images: Tensor) -> Tensor:
    """[N, 3, H, W] float in [-1, 1] (clipped) -> uint8 in [0, 255], rounded to nearest, on the same device.

    Raises:
        UserError: an image is not finite. Cast to bytes it would look like a dark picture instead of a diverged model.
    """
    finite = torch.isfinite(images).flatten(1).all(1)
    if not finite.all():
        bad = int((~finite).sum())
        raise UserError(
            f"{bad} of {len(images)} images contain NaN or infinity: the model has diverged; use an earlier checkpoint"
        )
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] uint8 -> RGB image."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be uint8 [3, H, W], not {image.dtype} {list(image.shape)}; see to_uint8")
    return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())


def save_png(image: Tensor | Image.Image, path: str | Path) -> None:
    """Write [3, H, W] uint8, or a PIL image, as a PNG: whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    picture = to_pil(image) if isinstance(image, Tensor) else image
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def sheet(rows: list[tuple[str, Tensor]], captions: list[str] | None = None) -> Image.Image:
    """A labelled grid: one row of images per arm, one column per prompt.

    Args:
        rows: (label, images [K, 3, H, W] uint8) from top to bottom; rows may differ in K, not in H and W. Images
            below 96 pixels are enlarged by a whole factor without smoothing, so that every pixel stays as it was;
            those above 320 are reduced.
        captions: text above each column, wrapped and cut to 3 lines; None for none.

    Returns:
        An RGB image on white.

    Raises:
        ValueError: no rows, images of different sizes, or another number of captions than columns.
    """
    columns = max((len(images) for _, images in rows), default=0)
    sizes = {tuple(images.shape[-2:]) for _, images in rows}
    if columns == 0 or len(sizes) != 1:
        raise ValueError(f"a sheet needs images of one size; got {columns} columns and sizes {sorted(sizes)}")
    if captions is not None and len(captions) != columns:
        raise ValueError(f"{len(captions)} captions for {columns} columns")
    height, width = sizes.pop()
    zoom = math.ceil(_MIN_CELL / min(height, width))
    shrink = min(1.0, _MAX_CELL / max(height, width))
    cell_h, cell_w = round(height * zoom * shrink), round(width * zoom * shrink)

    font = ImageFont.load_default(_FONT_SIZE)
    labels = [_wrap(label, font, _MAX_LABEL_WIDTH, _MAX_LINES) for label, _ in rows]
    heads = [_wrap(caption, font, cell_w, _MAX_LINES) for caption in captions or []]
    left = _GAP + max(_text_size(label, font)[0] for label in labels) + _GAP
    top = _GAP + max((_text_size(head, font)[1] + _GAP for head in heads), default=0)

    picture = Image.new("RGB", (left + columns * (cell_w + _GAP), top + len(rows) * (cell_h + _GAP)), _PAPER)
    draw = ImageDraw.Draw(picture)
    for column, head in enumerate(heads):
        middle = left + column * (cell_w + _GAP) + cell_w / 2
        draw.text((middle, top - _GAP), head, _INK, font, anchor="md", align="center")
    for row, (label, (_, images)) in enumerate(zip(labels, rows, strict=True)):
        y = top + row * (cell_h + _GAP)
        draw.text((left - _GAP, y + cell_h / 2), label, _INK, font, anchor="rm", align="right")
        for column, image in enumerate(images):
            method = Image.Resampling.NEAREST if shrink == 1 else Image.Resampling.LANCZOS
            cell = to_pil(image).resize((cell_w, cell_h), method)
            picture.paste(cell, (left + column * (cell_w + _GAP), y))
    return picture


def _wrap(text: str, font: Font, width: float, max_lines: int) -> str:
    """Lines at most `width` pixels wide, broken at spaces and hyphens where possible; an ellipsis marks a cut."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < max_lines:
        line = rest[: _fitting(rest, font, width)]
        if len(line) < len(rest) and rest[len(line)] != " ":
            line = line[: max(line.rfind(" "), line.rfind("-") + 1, 0)] or line
        lines.append(line)
        rest = rest[len(line) :].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last + "…"
    return "\n".join(lines)


def _text_size(text: str, font: Font) -> tuple[int, int]:
    """Width and height in pixels of text that may have several lines."""
    _, _, right, bottom = ImageDraw.Draw(Image.new("1", (1, 1))).multiline_textbbox((0, 0), text, font)
    return math.ceil(right), math.ceil(bottom)


def _fitting(text: str, font: Font, width: float) -> int:
    """How many leading characters of text fit in width, at least one."""
    count = 1
    while count < len(text) and font.getlength(text[: count + 1]) <= width:
        count += 1
    return count
