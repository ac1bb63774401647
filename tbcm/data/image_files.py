"""Captioned images that are files of their own: named in a metadata file, or beside their captions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tbcm.config.resolution import Size
from tbcm.data.bad import Bad, SampleError
from tbcm.data.captions import PromptSource
from tbcm.data.decoding import decode_file, decoded
from tbcm.data.files import is_file, natural, reason, shown
from tbcm.data.samples import IMAGES, Samples, caption_of, given, report, shown_name
from tbcm.data.tables import place, read_columns
from tbcm.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class ImageFiles:
    """Files below `folder`, by name, and their captions."""

    def __init__(self, name: str, folder: Path, files: list[str], captions: list[list[str]]) -> None:
        self.name, self.folder = name, folder
        self._files, self.captions = PromptSource.of(name, files), PromptSource.of(name, captions)

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, indices: Sequence[int], size: Size) -> Tensor:
        """See `tbcm.data.images.CaptionedImages`."""
        return decoded(lambda i: decode_file(self.folder / self._files[i], size), indices)


def read_metadata(metadata: Path, column: str = "text", max_bad_share: float = 0.0) -> ImageFiles:
    """Hugging Face's imagefolder: each row names a file (relative to the folder) in `file_name` and has its caption, or
    a list of them, in `column`.

    Raises UserError where the metadata is malformed, lacks a column or has no rows, or too many rows have no caption or
    name no image that is there. A damaged image is found when it is decoded.
    """
    bad = Bad(str(metadata), max_bad_share)
    files, captions = [], []
    for where, (name, caption) in read_columns(metadata, ["file_name", column]):
        try:
            at = place(metadata, where)
            texts = given(caption, f"{at}: {column}")
            file = _file_name(name, f"{at}: file_name")
            if not is_file(metadata.parent / file):
                path = str(metadata.parent / file)
                path = path if len(path) < 500 else f"{path[:500]}..."
                raise SampleError(f"{at}: {path} is missing; put it there or take its row out", "missing image")
        except SampleError as error:
            bad.add(error)
            continue
        files.append(file)
        captions.append(texts)
    bad.report(len(files) + bad.count)
    if not files:
        raise UserError(f"{metadata}: has no rows; give each image one")
    return ImageFiles(str(metadata), metadata.parent, files, captions)


def read_pairs(folder: Path, column: str = "text", max_bad_share: float = 0.0) -> ImageFiles:
    """Images at any depth in a folder, each with its caption beside it: `1.png` and `1.txt`, or `1.json` with `column`.

    They come folder by folder, in natural order. Raises UserError where there are none, or too many have no caption.
    """
    bad, groups = Bad(str(folder), max_bad_share), []
    files, captions = [], []
    for inside in _folders(folder):
        groups.append(_in_folder(inside))
        for sample in groups[-1]:
            try:
                if isinstance(sample, SampleError):
                    raise sample
                key, image, members = sample
                texts, _ = caption_of(members, column, _read, str(inside / shown_name(key)))
                files.append(_file_name(os.path.relpath(image, folder), f"{shown_name(str(image))}: its name"))
                captions.append(texts)
            except SampleError as error:
                bad.add(error)
    if not files and not bad.count:
        raise UserError(
            f"{folder}: holds no images: give .tar or .parquet files, a {' or '.join(METADATA)} with each image's"
            f" file_name and caption, or images (.{', .'.join(IMAGES)}) with a .txt beside each"
        )
    report(str(folder), groups, bad, len(files) + bad.count)
    return ImageFiles(str(folder), folder, files, captions)


def _folders(folder: Path) -> list[Path]:
    """`folder` and those below it, without hidden ones."""
    found = []
    for inside, below, _ in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        found.append(Path(inside))
    return sorted(found, key=natural)


def _in_folder(folder: Path) -> Samples[Path]:
    samples = Samples[Path](str(folder))
    for file in sorted(folder.iterdir(), key=natural):
        if file.name.startswith(".") or not is_file(file):
            continue
        # Unlike in a shard, the last dot begins the ending, as for every other program that looks at a folder.
        samples.add(file.name, file.stem, file.suffix[1:].lower(), file)
    return samples


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {reason(error)}") from None


def _file_name(value: object, what: str) -> str:
    """A name that can be kept. Raises SampleError where it is none."""
    (name, *others) = given(value, what)
    if others:
        raise SampleError(f"{what} is {shown(value)}; give one name", "several file names")
    return name
