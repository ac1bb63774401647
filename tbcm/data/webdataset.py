"""Captioned images in WebDataset shards: uncompressed .tar files of samples such as `0001.jpg` and `0001.txt`.

The shards' headers are read once, when a run starts (two minutes for a million samples; `tbcm.encode_images` spares
that); from then on an image is one read at a known place, in any order. The `webdataset` library reads shards as a
stream, whose order it cannot repeat from the middle of a run. Its `wids` reads at places too, but says nothing of
samples it loses: what follows a name's first dot, the end mark of a joined shard, or the place where a shard was cut.
"""

from __future__ import annotations

import logging
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from tbcm.config.resolution import Size
from tbcm.data.bad import Bad, SampleError
from tbcm.data.captions import PromptSource
from tbcm.data.decoding import decode, decoded
from tbcm.data.files import HEAD_BYTES, reason, what_it_is
from tbcm.data.samples import Samples, caption_of, report, shown_name
from tbcm.errors import UserError

logger = logging.getLogger(__name__)

CHUNK = 2**20


class WebDataset:
    """The samples of shards, shard by shard.

    A sample is the files of a shard that have the same name up to the first dot of it, as `webdataset` has it: one
    .jpg, .jpeg, .png or .webp, and its caption in a .json object's `column` or else in a .txt. Other files are passed
    over, counted and told; bad samples too, if no more than `max_bad_share`.

    Raises:
        UserError: a shard is missing, compressed, cut, joined from several or no .tar file; too many samples have no
            image or caption, several images, or a damaged .json or text. A damaged image is found when it is decoded.
    """

    def __init__(self, name: str, shards: Sequence[Path], column: str = "text", max_bad_share: float = 0.0) -> None:
        self.name, self.column = name, column
        self._shards = shards
        self._shard, self._start, self._bytes = array("q"), array("q"), array("q")  # of each image
        self._from_json = 0
        bad, groups = Bad(name, max_bad_share), []
        names: list[str] = []
        captions: list[list[str]] = []
        for number, shard in enumerate(shards):
            groups.append(Samples[tarfile.TarInfo](str(shard)))
            for image, texts in self._index(shard, groups[-1], bad):
                names.append(shown_name(image.name))  # for messages only
                captions.append(texts)
                self._shard.append(number)
                self._start.append(image.offset_data)
                self._bytes.append(image.size)
        report(name, groups, bad, len(captions) + bad.count)
        # As Arrow: millions of strings would be as many objects.
        self._names, self.captions = PromptSource.of(name, names), PromptSource.of(name, captions)
        logger.info(
            "%s: %s images in %s shards; captions: %s of .json (%s), %s of .txt",
            *(name, f"{len(self):,}", f"{len(shards):,}", f"{self._from_json:,}", column),
            f"{len(self) - self._from_json:,}",
        )

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, indices: Sequence[int], size: Size) -> Tensor:
        """See `tbcm.data.images.CaptionedImages`."""
        return decoded(partial(self._image, size), indices)

    def _image(self, size: Size, index: int) -> Tensor:
        shard = self._shards[self._shard[index]]
        name = f"{shard}: {self._names[index]}"
        try:
            with shard.open("rb") as file:  # opened anew: a process may not hold thousands of files
                file.seek(self._start[index])
                content = file.read(self._bytes[index])
        except OSError as error:
            raise UserError(f"{name}: cannot be read: {reason(error)}") from None
        return decode(content, size, name)

    def _index(
        self, shard: Path, samples: Samples[tarfile.TarInfo], bad: Bad
    ) -> Iterator[tuple[tarfile.TarInfo, list[str]]]:
        """Place of the image and caption of each good sample of a shard."""
        try:
            with shard.open("rb") as file:
                _sort(file, shard, samples)
                for sample in samples:
                    try:
                        if isinstance(sample, SampleError):
                            raise sample
                        key, image, members = sample
                        where = f"{shard}: {shown_name(key)}"
                        texts, ending = caption_of(members, self.column, _reader(file), where)
                    except SampleError as error:
                        bad.add(error)
                        continue
                    self._from_json += ending == "json"
                    yield image, texts
        except OSError as error:
            raise UserError(f"{shard}: cannot be read: {reason(error)}") from None


def _reader(file: BinaryIO) -> Callable[[tarfile.TarInfo], bytes]:
    def read(member: tarfile.TarInfo) -> bytes:
        file.seek(member.offset_data)
        return file.read(member.size)

    return read


def _sort(file: BinaryIO, shard: Path, samples: Samples[tarfile.TarInfo]) -> None:
    """The members of a shard, in their order."""
    if kind := what_it_is(file.read(HEAD_BYTES)):
        raise UserError(f"{shard}: not a whole, uncompressed .tar file: it is {kind}")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            end = -1
            while member := tar.next():
                if member.offset <= end:  # a negative size leads back, and on without end
                    raise tarfile.ReadError(f"the member at byte {member.offset} has no proper size")
                end = member.offset
                _add(member, samples)
            end = tar.offset
    except OSError:
        raise
    except Exception as error:  # tarfile raises ValueError, OverflowError, ... on damaged headers
        raise UserError(
            f"{shard}: not a whole, uncompressed .tar file ({reason(error)}); unpack it or copy it again"
        ) from None
    _check_end(file, shard, end)


def _add(member: tarfile.TarInfo, samples: Samples[tarfile.TarInfo]) -> None:
    folder, slash, name = member.name.rpartition("/")
    stem, _, ending = name.partition(".")
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        samples.pass_over(member.name, "sparse file" if member.issparse() else "link or device")
    elif name.startswith("."):
        samples.pass_over(member.name, "hidden file")
    else:
        samples.add(member.name, folder + slash + stem, ending.lower(), member)


def _check_end(file: BinaryIO, shard: Path, end: int) -> None:
    """What follows the last member is an end mark of zeros, and nothing but zeros."""
    file.seek(end)  # tarfile takes a header that it cannot read for the end
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(
            f"{shard}: damaged or cut after {end:,} bytes, where a file or its end should be; copy it again"
        )
    while chunk := file.read(CHUNK):
        if chunk.strip(b"\0"):
            raise UserError(
                f"{shard}: has data after its end mark at byte {end:,}, perhaps another .tar: give that as a shard of"
                " its own, or join them with tar --concatenate"
            )
