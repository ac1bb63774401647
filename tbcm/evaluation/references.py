"""Real images with captions that generated ones are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tbcm.config.resolution import Size
from tbcm.data.decoding import decode_file, decoded
from tbcm.data.files import is_file
from tbcm.data.image_files import METADATA
from tbcm.data.images import CaptionedImages, open_images
from tbcm.data.tables import parse_json
from tbcm.errors import UserError

MJHQ_METADATA = "meta_data.json"


def open_reference(folder: Path) -> CaptionedImages:
    """A folder in MJHQ-30k's layout, or one that `tbcm.data.images` reads."""
    if (folder / MJHQ_METADATA).is_file():
        return Mjhq(folder)
    if folder.is_dir() and not any((folder / name).is_file() for name in METADATA):
        raise UserError(
            f"{folder}: has neither MJHQ-30k's {MJHQ_METADATA} nor a {METADATA[0]}; give --reference such a folder"
        )
    return open_images(str(folder))


class Mjhq:
    """The layout of MJHQ-30k: meta_data.json maps an id to its category and prompt, CATEGORY/ID.jpg is the image.

    Raises:
        UserError: the metadata cannot be read, or an image is missing.
    """

    def __init__(self, folder: Path) -> None:
        metadata = folder / MJHQ_METADATA
        try:
            rows = parse_json(metadata.read_text(encoding="utf-8"), str(metadata))
            self._files = [folder / row["category"] / f"{name}.jpg" for name, row in rows.items()]
            self.captions: Sequence[str] = [str(row["prompt"]).strip() for row in rows.values()]
        except (OSError, ValueError, AttributeError, TypeError, KeyError, UserError) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            raise UserError(
                f'{metadata}: is not {{"ID": {{"category": ..., "prompt": ...}}, ...}} ({reason}); download it again'
            ) from None
        if missing := [file for file in self._files if not is_file(file)]:
            raise UserError(
                f"{folder}: {len(missing):,} of {len(self._files):,} images are missing, the first is"
                f" {str(missing[0])[:500]}; unpack MJHQ-30k's images beside its metadata"
            )

    def __len__(self) -> int:
        return len(self._files)

    def images(self, indices: Sequence[int], size: Size) -> Tensor:
        """See `CaptionedImages`."""
        return decoded(lambda i: decode_file(self._files[i], size), indices)
