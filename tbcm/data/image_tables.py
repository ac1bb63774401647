"""Captioned images inside Parquet files, as Hugging Face's hub keeps them."""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from tbcm.config.resolution import Size
from tbcm.data.bad import Bad, SampleError
from tbcm.data.captions import PromptSource
from tbcm.data.decoding import decode, decode_file, decoded
from tbcm.data.files import is_file
from tbcm.data.samples import given
from tbcm.data.tables import explained, open_parquet, place, read_columns
from tbcm.errors import UserError

KEPT_GROUPS = 4  # of rows, read whole: Parquet has no smaller unit; the hub's are of 100 rows


class ImageTables:
    """The rows of Parquet files that have an image, a column of {bytes, path} or of bytes, and a caption in `column`,
    a text or a list of some.

    An image costs the reading of its row group, unless that was among the last: encode them once
    (`tbcm.encode_images`), which goes through them in order. `path` counts, relative to its file, where there are no
    bytes. Bad samples are skipped, counted and told, if no more than `max_bad_share`.

    Raises:
        UserError: a file is missing or damaged, has no column of captions or not one of images; or too many rows are
            bad. A damaged image is found when it is decoded.
    """

    def __init__(self, name: str, files: Sequence[Path], column: str = "text", max_bad_share: float = 0.0) -> None:
        self.name, self.files = name, files
        self._file, self._row = array("q"), array("q")  # of each image
        self._columns = [_image_column(file) for file in files]
        bad, captions = Bad(name, max_bad_share), []
        for number, file in enumerate(files):
            for where, (caption,) in read_columns(file, [column]):
                try:
                    captions.append(given(caption, f"{place(file, where)}: {column}"))
                except SampleError as error:
                    bad.add(error)
                    continue
                self._file.append(number)
                self._row.append(where - 1)
        bad.report(len(captions) + bad.count)
        if not captions:
            raise UserError(f"{name}: has no rows; give each image one")
        self.captions = PromptSource.of(name, captions)
        self._lock = threading.Lock()
        self._group = lru_cache(KEPT_GROUPS)(self._read_group)
        self._starts = lru_cache(None)(self._read_starts)

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, indices: Sequence[int], size: Size) -> Tensor:
        """See `tbcm.data.images.CaptionedImages`."""
        return decoded(partial(self._image, size), indices)

    def _image(self, size: Size, index: int) -> Tensor:
        file, row = self.files[self._file[index]], self._row[index]
        where = place(file, row + 1)
        content, path = self._content(self._file[index], row)
        if content is not None:
            return decode(content, size, where)
        if path is not None and is_file(file.parent / path):
            return decode_file(file.parent / path, size)
        raise SampleError(f"{where}: has no image, neither bytes nor a path to a file that is there", "no image")

    def _content(self, number: int, row: int) -> tuple[bytes | None, str | None]:
        with self._lock:  # threads that decode ask for rows of the same group
            starts = self._starts(number)
            group = bisect_right(starts, row) - 1
            rows = self._group(number, group)
        if row - starts[group] >= len(rows):
            raise UserError(f"{self.files[number]}: was changed since this run began; start it again")
        value = rows[row - starts[group]].as_py()
        if isinstance(value, dict):
            return value["bytes"], value.get("path")
        return value, None

    def _read_starts(self, number: int) -> list[int]:
        """The first row of each row group of a file."""
        file = self.files[number]
        starts = [0]
        with open_parquet(file) as opened, explained(file):
            for group in range(opened.metadata.num_row_groups):
                starts.append(starts[-1] + opened.metadata.row_group(group).num_rows)
        return starts[:-1]

    def _read_group(self, number: int, group: int) -> Any:
        file = self.files[number]
        with open_parquet(file) as opened, explained(file):
            column = opened.read_row_group(group, columns=[self._columns[number]]).column(0)
            column.validate(full=True)
            return column


def _image_column(file: Path) -> str:
    """The one column of {bytes, path}, or else of bytes."""
    with open_parquet(file) as opened, explained(file):
        schema = opened.schema_arrow
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and _may_be_bytes(_field(f.type, "bytes"))]
    plain = [f.name for f in schema if _is_bytes(f.type)]
    for names in (structs, plain):
        if len(names) > 1 and "image" in names:
            return "image"
        if len(names) == 1:
            return names[0]
    kinds = ", ".join(f"{f.name}: {f.type}"[:80] for f in list(schema)[:20])
    raise UserError(f"{file}: has no column of images ({{bytes, path}} or bytes), or several; it has {kinds or 'none'}")


def _field(kind: pa.StructType, name: str) -> pa.DataType | None:
    index = kind.get_field_index(name)
    return kind.field(index).type if index >= 0 else None


def _is_bytes(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _may_be_bytes(kind: pa.DataType | None) -> bool:
    """Where no image has any, the column `bytes` has no type."""
    return _is_bytes(kind) or (kind is not None and pa.types.is_null(kind))
