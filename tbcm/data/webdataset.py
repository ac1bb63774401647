"""Captioned images in WebDataset shards: uncompressed .tar files of samples such as `0001.jpg` and `0001.txt`.

The shards' headers are read once, when a run starts (two minutes for a million samples; `tbcm.encode_images` spares
that); from then on an image is one read at a known place, in any order. (The `webdataset` library reads shards as a
stream, whose order it cannot repeat from the middle of a run.)
"""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from tbcm.data.decoding import decode, decoded
from tbcm.data.prompts import PromptSource
from tbcm.errors import UserError

logger = logging.getLogger(__name__)

IMAGES = "jpg", "jpeg", "png", "webp"

Members = dict[str, tarfile.TarInfo]  # of one sample, by extension


class WebDataset:
    """The samples of the shards that `path` names, which may hold * and ? or one range {00000..00041}, shard by shard
    in the order of their names.

    A sample is the files of a shard that have the same name up to the first dot of it: one .jpg, .jpeg, .png or .webp,
    and its caption in a .json object's `column` or else in a .txt. Other files are passed over. Images are made square,
    of `image_size` pixels (see `decode`).

    Raises:
        UserError: a shard is missing, compressed, cut or no .tar file; a sample without an image or a caption, with
            several images, or one whose .json or text is damaged. A damaged image is found when it is decoded.
    """

    def __init__(self, path: str, image_size: int, column: str = "text") -> None:
        self.size, self.column = image_size, column
        self._shards = _shards(path)
        self._shard, self._start, self._bytes = array("q"), array("q"), array("q")  # of each image
        self._from_json = 0
        names, captions = [], []
        for number, shard in enumerate(self._shards):
            for name, caption, image in self._index(shard):
                names.append(name.encode(errors="replace").decode())  # for messages only: any bytes may be in it
                captions.append(caption)
                self._shard.append(number)
                self._start.append(image.offset_data)
                self._bytes.append(image.size)
        if not captions:
            raise UserError(f"{path}: holds no samples; give each image {IMAGES[0]} or the like, and a .txt or .json")
        # As Arrow: millions of strings would be as many objects.
        self._names, self.captions = (PromptSource.of(Path(path), texts) for texts in (names, captions))
        logger.info(
            "%s: %s images in %s shards; captions: %s of .json (%s), %s of .txt",
            *(path, f"{len(self):,}", f"{len(self._shards):,}", f"{self._from_json:,}", column),
            f"{len(self) - self._from_json:,}",
        )

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, indices: Sequence[int]) -> Tensor:
        """See `tbcm.data.images.CaptionedImages`. Raises UserError naming the first image that cannot be decoded."""
        return decoded(self._image, indices)

    def _image(self, index: int) -> Tensor:
        shard = self._shards[self._shard[index]]
        name = f"{shard}: {self._names[index]}"
        try:
            with shard.open("rb") as file:  # opened anew: a process may not hold thousands of files
                file.seek(self._start[index])
                content = file.read(self._bytes[index])
        except OSError as error:
            raise UserError(f"{name}: cannot be read: {error.strerror}") from error
        return decode(io.BytesIO(content), self.size, name)

    def _index(self, shard: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        """Name of the image, caption and place of the image of each sample of a shard."""
        try:
            with shard.open("rb") as file:
                samples = _samples(file, shard)
                for key, members in samples.items():
                    where = f"{shard}: {key}"
                    images = [extension for extension in IMAGES if extension in members]
                    if len(images) != 1:
                        found = " and ".join(f".{e}" for e in images) or "no image"
                        raise UserError(f"{where}: has {found}; a sample has one .{', .'.join(IMAGES)}")
                    yield members[images[0]].name, self._caption(file, members, where), members[images[0]]
        except OSError as error:
            raise UserError(f"{shard}: cannot be read: {error.strerror}") from error

    def _caption(self, file: BinaryIO, members: Members, where: str) -> str:
        other = ""
        if "json" in members:
            row = _json(_text(file, members["json"], where), f"{where}.json")
            if self.column in row:
                self._from_json += 1
                return _given(row[self.column], f"{where}.json: {self.column}")
            other = f"; .json has {', '.join(map(repr, row)) or 'nothing'}"
        if "txt" not in members:
            raise UserError(f"{where}: has no caption; give it a .txt, or a .json with {self.column!r}{other}")
        return _given(_text(file, members["txt"], where), f"{where}.txt")


def _shards(path: str) -> list[Path]:
    pattern = Path(path).expanduser()
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", str(pattern)):
        first, last = braces.groups()
        numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
        found = [Path(str(pattern).replace(braces[0], number)) for number in numbers]
    elif pattern.exists():
        found = [pattern]
    else:
        found = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    if not found:
        raise UserError(f"{path}: no such shards")
    return found


def _samples(file: BinaryIO, shard: Path) -> dict[str, Members]:
    """The members of a shard by key and by extension, in order of the keys' first appearance."""
    samples: dict[str, Members] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                extension = extension.lower()
                if not member.isreg() or extension not in (*IMAGES, "txt", "json"):
                    continue
                members = samples.setdefault(folder + slash + stem, {})
                if extension in members:
                    raise UserError(f"{shard}: {member.name}: is there twice; give each sample a name of its own")
                members[extension] = member
            end = tar.offset
    except tarfile.TarError as error:
        raise UserError(
            f"{shard}: not a whole, uncompressed .tar file ({error}); unpack it or copy it again"
        ) from error
    file.seek(end)  # tarfile takes a header that it cannot read for the end
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(
            f"{shard}: damaged or cut after {end:,} bytes, where a file or its end should be; copy it again"
        )
    return samples


def _text(file: BinaryIO, member: tarfile.TarInfo, where: str) -> str:
    file.seek(member.offset_data)
    try:
        return file.read(member.size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {member.name} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _json(text: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at character {error.pos + 1}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: give an object such as {{'text': ...}}")
    return row


def _given(caption: object, where: str) -> str:
    if not isinstance(caption, str) or not caption.strip() or not _is_unicode(caption):
        raise UserError(f"{where} is {caption!r}; give text or take the sample out")
    return caption.strip()


def _is_unicode(text: str) -> bool:
    """JSON can hold halves of surrogate pairs."""
    return text == text.encode(errors="replace").decode()
