"""Text files line by line: encodings, gzip, and files that are something else than their name says."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from tbcm.data.files import HEAD_BYTES, reason, what_it_is
from tbcm.errors import UserError

MAX_LINE = 256 * 2**20
"""Characters. Longer lines are no text, and would fill the memory."""

_MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@contextmanager
def opened(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """A text file, unpacked where its name ends in .gz: UTF-8, or UTF-16 or -32 with a mark.

    Raises UserError, while it is opened or read inside: it is not text, compressed under another name, or damaged.
    """
    try:
        with _explained(path), _bytes(path) as file:
            head = file.read(HEAD_BYTES)
            if kind := what_it_is(head):
                raise UserError(f"{path}: is {kind}")
            file.seek(0)
            encoding = encoding_of(head)
            with io.TextIOWrapper(file, encoding, newline=newline) as text:
                yield text
    except UnicodeError as error:
        with _explained(path):
            raise UserError(f"{path}: {_where_wrong(path, error)}; save the file as UTF-8") from None


def lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of a text file with their ends, of at most `MAX_LINE` characters and without NUL bytes."""
    with opened(path, newline) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise UserError(f"{path}, line {number}: has more than {MAX_LINE:,} characters; give a text file")
            if "\0" in line:
                raise UserError(f"{path}, line {number}: {nul(line)}")
            yield line


def nul(text: str) -> str:
    """What is wrong with `text`, which has NUL bytes."""
    if text.count("\0") * 3 > len(text):
        return "looks like UTF-16 without its mark, or is not text; save it as UTF-8"
    return f"has a NUL byte after {text.index(chr(0)):,} characters; it is damaged or not text"


def encoding_of(head: bytes) -> str:
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8-sig")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cut or damaged ({reason(error)}); copy it again") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeError):
            raise
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None


@contextmanager
def _bytes(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        if path.suffix.lower() != ".gz":
            yield file
            return
        head = file.read(HEAD_BYTES)
        if head[:2] != b"\x1f\x8b":
            raise UserError(
                f"{path}: is {what_it_is(head) or 'not compressed, though its name ends in .gz: rename it'}"
            )
        file.seek(0)
        with gzip.open(file) as unpacked:
            yield cast(BinaryIO, unpacked)


def _where_wrong(path: Path, error: UnicodeError) -> str:
    """Line, offset and value of the first byte that is not UTF-8."""
    start = 0
    with _bytes(path) as file:
        if (encoding := encoding_of(file.read(4))) != "utf-8-sig":
            return f"is not {encoding.upper()}, as its first bytes say ({reason(error)})"
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as found:
                return f"line {number}, byte {start + found.start:,} (0x{line[found.start]:02x}) is not UTF-8"
            start += len(line)
    return "was changed while it was read"
