"""Image files to tensors."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tbcm.config.resolution import Size
from tbcm.data.bad import SampleError
from tbcm.data.files import HEAD_BYTES, reason, what_it_is
from tbcm.errors import UserError

MAX_THREADS = 8  # that decode; Pillow lets go of the interpreter meanwhile
FORMATS = "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"
"""Others are not tried: Pillow runs Ghostscript on EPS, whatever the file is called."""

_UPRIGHT = {  # EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged EXIF, large images: those that matter are errors too


def decode(content: bytes, size: Size, name: str) -> Tensor:
    """The bytes of an image file as [3, *size] uint8: cropped about its centre to that shape and resized, bicubic with
    antialiasing. EXIF rotation is applied and transparency laid on white; an animation's first picture counts.

    Raises:
        SampleError: it cannot be decoded, or has more than 8 bits a channel; the message begins with `name`.
    """
    if not content:
        raise SampleError(f"{name}: cannot be decoded (it is empty); replace it or take it out", "empty image")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            if opened.mode.startswith(("I", "F")):  # Pillow would clip these to white instead of scaling them
                raise SampleError(
                    f"{name}: its pixels have more than 8 bits a channel; convert it to 8", "more than 8 bits a channel"
                )
            image: Image.Image = opened
            if turn := _UPRIGHT.get(_orientation(opened)):
                image = image.transpose(turn)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            height, width = size
            cropped = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    except SampleError:
        raise
    except UnidentifiedImageError:
        kind = what_it_is(content[:HEAD_BYTES]) or f"not a whole {', '.join(FORMATS)} file"
        raise SampleError(f"{name}: cannot be decoded (it is {kind}); replace it or take it out", "no image") from None
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, EOFError, ... on damaged files
        raise SampleError(
            f"{name}: cannot be decoded ({reason(error)}); replace it or take it out", "damaged image"
        ) from None
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)


def decode_file(path: Path, size: Size) -> Tensor:
    """See `decode`. Raises UserError also where the file cannot be read, which does not make it a bad sample."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    return decode(content, size, str(path))


def decoded(image: Callable[[int], Tensor], indices: Sequence[int]) -> Tensor:
    """`image(i)` [3, H, W] uint8 of each index, in threads: [B, 3, H, W] float32 in [-1, 1].

    Raises what `image` does; a SampleError with its index."""

    def one(index: int) -> Tensor:
        try:
            return image(index)
        except SampleError as error:
            error.index = index
            raise

    with ThreadPoolExecutor(min(MAX_THREADS, len(indices), os.cpu_count() or 1)) as pool:
        return to_unit(torch.stack(list(pool.map(one, indices))))


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def _orientation(image: Image.Image) -> int:
    """EXIF that is damaged says nothing about how an image lies, and nothing against its pixels."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # struct.error, SyntaxError, ... as above
        return 1
