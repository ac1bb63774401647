"""Image files to tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tbcm.errors import UserError

MAX_THREADS = 8  # that decode; Pillow lets go of the interpreter meanwhile


def decode(file: Path | BinaryIO, size: int, name: str | None = None) -> Tensor:
    """An image file as [3, size, size] uint8: cropped about its centre to a square and resized, bicubic with
    antialiasing. EXIF rotation is applied and transparency laid on white.

    Raises:
        UserError: it cannot be decoded, or has more than 8 bits a channel; `name` (default: the path) says which it is.
    """
    name = name or str(file)
    try:
        with Image.open(file) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):  # Pillow would clip these to white instead of scaling them
                raise UserError(f"{name}: its pixels have more than 8 bits a channel; convert it to 8")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, EOFError, ... on damaged files
        raise UserError(f"{name}: cannot be decoded ({error}); replace it or take it out") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def decoded(image: Callable[[int], Tensor], indices: Sequence[int]) -> Tensor:
    """`image(i)` [3, H, W] uint8 of each index, in threads: [B, 3, H, W] float32 in [-1, 1]."""
    with ThreadPoolExecutor(min(MAX_THREADS, len(indices), os.cpu_count() or 1)) as pool:
        return to_unit(torch.stack(list(pool.map(image, indices))))


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
