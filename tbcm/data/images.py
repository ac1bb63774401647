"""Captioned images, for the baselines that train on data. They are decoded when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tbcm.config.resolution import Size
from tbcm.data.captions import PromptSource
from tbcm.data.decoding import to_unit
from tbcm.data.files import expand, is_file, is_folder, of_training, own_files, training_part
from tbcm.data.image_files import METADATA, read_metadata, read_pairs
from tbcm.data.image_tables import ImageTables
from tbcm.data.samples import IMAGES
from tbcm.data.webdataset import WebDataset
from tbcm.errors import UserError
from tbcm.icons.bundle import worded
from tbcm.icons.captions import Catalogue, Prompt
from tbcm.icons.colours import PAIRS, colours_of, compose, fixed_jitter
from tbcm.icons.dataset import chance, load_drawings
from tbcm.icons.masks import SIZE

_SHARE = 1 / 8


class CaptionedImages(Protocol):
    """Images with captions."""

    @property
    def captions(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int], size: Size) -> Tensor:
        """Those images in that order, [B, 3, *size] float32 in [-1, 1] on the CPU (see `tbcm.data.decoding.decode`).

        Raises SampleError, with its index, for the first that cannot be decoded.
        """
        ...


def open_images(path: str, column: str = "text", max_bad_share: float = 0.0) -> CaptionedImages:
    """The images that `path` names:

    'icons': those that are shipped.
    A folder with a metadata.jsonl, .csv or .parquet: `file_name` names each row's image.
    .tar files: see `WebDataset`. .parquet files: see `ImageTables`. Both may be patterns, or in a folder.
    A folder of images, at any depth, with a .txt or .json beside each.

    Of a folder that is none of these, its train/ or data/ is taken. Captions are in `column` (not of .txt). Bad samples
    are skipped, counted and told, if no more than `max_bad_share`.

    Raises:
        UserError: there are no such images; metadata is malformed; or too many samples are bad.
    """
    if path == "icons":
        return ShippedIcons()
    found = expand(path)
    if not found:
        raise UserError(f"{path}: no such folder of images, nor .tar or .parquet files")
    if len(found) == 1 and is_folder(found[0]):
        return _of_folder(found[0], path, column, max_bad_share)
    return _of_files(found, path, column, max_bad_share)


def metadata_of(folder: Path) -> Path | None:
    """The file that names a folder's images and their captions, if it has one."""
    return next((folder / name for name in METADATA if is_file(folder / name)), None)


def _of_folder(folder: Path, path: str, column: str, max_bad_share: float) -> CaptionedImages:
    options = column, max_bad_share
    for part in training_part(folder):
        if metadata := metadata_of(part):
            return read_metadata(metadata, *options)
        if files := own_files(part, (".tar",)) or own_files(part, (".parquet",)):
            return _of_files(of_training(files), path, *options)
        if own_files(part, tuple(f".{image}" for image in IMAGES)):
            return read_pairs(part, *options)
    return read_pairs(next((part for part in training_part(folder) if part.name == "train"), folder), *options)


def _of_files(files: list[Path], path: str, column: str, max_bad_share: float) -> CaptionedImages:
    endings = {file.suffix.lower() for file in files}
    if endings == {".parquet"}:
        return ImageTables(path, files, column, max_bad_share)
    if all(".tar" in file.name.lower() for file in files):
        return WebDataset(path, files, column, max_bad_share)
    raise UserError(f"{path}: names neither .tar nor .parquet files but {', '.join(sorted(endings)) or 'others'}")


class ShippedIcons:
    """The drawings that the teacher is trained on, each in about an eighth of the colour pairs that are not held out
    with it, 64 px; composed when asked for. No drawing of the unseen sets.
    """

    def __init__(self) -> None:
        drawings = load_drawings(str(resources.files("tbcm.icons") / "assets")).select(unseen=False)
        catalogue = Catalogue(drawings.entries)
        self._masks, self._jitter = drawings.masks, fixed_jitter(drawings.entries)
        self._chosen = [
            (i, pair)
            for i, entry in enumerate(drawings.entries)
            for pair, (fg, bg) in enumerate(PAIRS)
            if chance("shipped", entry.key, fg, bg) < _SHARE
            and not catalogue.is_held_out(entry.concept, entry.style, fg)
        ]
        asked = [(drawings.entries[i], PAIRS[pair]) for i, pair in self._chosen]
        self.captions = PromptSource.of("icons", [worded(Prompt(e.concept, e.style, *pair)) for e, pair in asked])

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, indices: Sequence[int], size: Size) -> Tensor:
        """See `CaptionedImages`; of 64 x 64 only."""
        assert size == (SIZE, SIZE)
        drawn, pairs = torch.tensor([self._chosen[i] for i in indices]).unbind(1)
        return to_unit(compose(self._masks[drawn], colours_of(pairs, self._jitter[drawn, pairs])))
