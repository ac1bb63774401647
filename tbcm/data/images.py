"""Captioned images, for the baselines that train on data: a folder in Hugging Face's imagefolder layout, WebDataset
shards (`tbcm.data.webdataset`), or the shipped emoji. They are decoded when asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tbcm.data.decoding import decode, decoded, to_unit
from tbcm.data.prompts import PromptSource
from tbcm.data.tables import place, read_column
from tbcm.data.webdataset import WebDataset
from tbcm.emoji.dataset import SIZE, read_atlas
from tbcm.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class CaptionedImages(Protocol):
    """Images with one caption each."""

    @property
    def captions(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int]) -> Tensor:
        """Those images in that order, [B, 3, H, W] float32 in [-1, 1] on the CPU."""
        ...


def open_images(path: str, image_size: int, column: str = "text") -> CaptionedImages:
    """`path` 'emoji' is the shipped images; a folder is an `ImageFolder`, or where it holds .tar shards instead of
    metadata, like a path that names some, a `WebDataset`."""
    if path == "emoji":
        return ShippedEmoji(image_size)
    folder = Path(path).expanduser()
    if ".tar" in folder.name and not folder.is_dir():
        return WebDataset(path, image_size, column)
    if not any((folder / name).is_file() for name in METADATA) and any(folder.glob("*.tar")):
        return WebDataset(str(folder / "*.tar"), image_size, column)
    return ImageFolder(folder, image_size, column)


class ImageFolder:
    """A folder of images and a metadata.jsonl, .csv or .parquet whose rows name a file (relative to the folder) in
    `file_name` and its caption in `column`.

    Images are made square, of `image_size` pixels (see `decode`).

    Raises:
        UserError: no such folder, metadata or file; metadata that is malformed, empty or not UTF-8, lacks a column or
            has a row without a caption. A damaged image is found when it is decoded.
    """

    def __init__(self, path: str | Path, image_size: int, column: str = "text") -> None:
        self.folder, self.size = Path(path).expanduser(), image_size
        metadata = _metadata(self.folder)
        names, captions = _rows(metadata, column)
        self._files, self.captions = PromptSource.of(metadata, names), PromptSource.of(metadata, captions)
        for name in self._files:
            if not (self.folder / name).is_file():
                raise UserError(f"{metadata}: {self.folder / name} is missing; put it there or take its row out")

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, indices: Sequence[int]) -> Tensor:
        """See `CaptionedImages`. Raises UserError naming the first image that cannot be decoded."""
        return decoded(lambda i: decode(self.folder / self._files[i], self.size), indices)


class ShippedEmoji:
    """The shipped emoji without the held-out ones, 64 px on white.

    Raises:
        UserError: `image_size` is not 64.
    """

    def __init__(self, image_size: int) -> None:
        if image_size != SIZE:
            raise UserError(f"the emoji images have {SIZE} px, not {image_size}: set teacher.image_size={SIZE}")
        assets = Path(str(resources.files("tbcm.emoji") / "assets"))
        rows = json.loads((assets / "real.json").read_text(encoding="utf-8"))["images"]
        seen = [i for i, row in enumerate(rows) if not row["held_out"]]
        self.captions: Sequence[str] = [rows[i]["caption"] for i in seen]
        self._images = read_atlas(assets / "real.webp", len(rows))[seen]

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, indices: Sequence[int]) -> Tensor:
        """See `CaptionedImages`."""
        return to_unit(self._images[list(indices)])


def _metadata(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    for name in METADATA:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder}: has no {' or '.join(METADATA)}, nor .tar shards; write one with each image's file_name and caption"
    )


def _rows(metadata: Path, column: str) -> tuple[list[str], list[str]]:
    """File names and captions."""
    names, captions = [], []
    entries = zip(read_column(metadata, "file_name"), read_column(metadata, column), strict=True)
    for (where, name), (_, caption) in entries:
        for key, value in (("file_name", name), (column, caption)):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{place(metadata, where)}: {key} is {value!r}; give text or take it out")
        names.append(name.strip())
        captions.append(caption.strip())
    if not names:
        raise UserError(f"{metadata}: has no rows; give each image one")
    return names, captions
