"""Good files made bad, in the ways in which files go bad. Every mutation is a function of a seed."""

from __future__ import annotations

import random

_CODINGS = "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-8-sig", "cp037"
_HEADS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    b"<!DOCTYPE html>\n<html><body>404</body></html>",
    b"PK\x03\x04",
    b"\x1f\x8b\x08\0",
    b"\0" * 64,
    b"\xff\xfe",
    b"",
)
_TEXT = (
    *(
        b'"',
        b",",
        b"\n",
        b"\r",
        b"\r\n",
        b"\t",
        b"\0",
        b"{",
        b"}",
        b"[",
        b"]",
        b"\\",
        b"\\ud800",
        b":",
        b"null",
        b"1e999",
    ),
    *(b"NaN", b"-", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\x1b[2J", b"\xed\xa0\x80", b"[" * 3000, b"9" * 5000),
    *(b"../", b"/", b"true", b'""', b".", b"\xf0\x9f\x90\xbc", b"%"),
)
_NUMBERS = 0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1


def mutated(content: bytes, source: random.Random, *, same_length: bool = False) -> bytes:
    """`content` after one to six changes."""
    changed = bytearray(content)
    for _ in range(source.choice((1, 1, 1, 2, 3, 6))):
        source.choice(_IN_PLACE if same_length else _ANY)(changed, source)
    return bytes(changed)


def _place(content: bytearray, source: random.Random) -> int:
    """Anywhere, but half the time near an end, where headers, footers and tables are."""
    near = source.choice((len(content), 200, 40))
    at = source.randrange(max(1, min(near, len(content))))
    return at if source.random() < 0.6 else max(0, len(content) - 1 - at)


def _flip(content: bytearray, source: random.Random) -> None:
    if (at := _place(content, source)) < len(content):
        content[at] ^= 1 << source.randrange(8)


def _overwrite(content: bytearray, source: random.Random) -> None:
    at, size = _place(content, source), source.choice((1, 2, 4, 8))
    number = (source.choice(_NUMBERS) % 256**size).to_bytes(size, source.choice(("little", "big")))
    if at + size <= len(content):
        content[at : at + size] = number


def _noise(content: bytearray, source: random.Random) -> None:
    at = _place(content, source)
    size = min(source.randrange(1, 40), max(0, len(content) - at))
    content[at : at + size] = source.randbytes(size)


def _swap(content: bytearray, source: random.Random) -> None:
    """Two blocks of one size."""
    size = source.choice((1, 4, 16, 64, 512))
    if len(content) >= 2 * size:
        one, two = sorted(source.sample(range(len(content) // size), 2))
        a, b = slice(one * size, one * size + size), slice(two * size, two * size + size)
        content[a], content[b] = content[b], content[a]


def _cut(content: bytearray, source: random.Random) -> None:
    del content[_place(content, source) :]


def _remove(content: bytearray, source: random.Random) -> None:
    at = _place(content, source)
    del content[at : at + source.choice((1, 2, 5, 30, 600))]


def _insert(content: bytearray, source: random.Random) -> None:
    at = _place(content, source)
    content[at:at] = source.choice((source.choice(_TEXT), source.randbytes(source.randrange(1, 9))))


def _double(content: bytearray, source: random.Random) -> None:
    """A piece again, or the whole, as when files are joined."""
    at = _place(content, source)
    content += content[source.choice((0, at)) :]


def _coding(content: bytearray, source: random.Random) -> None:
    text = content.decode("utf-8", "replace")
    content[:] = text.encode(source.choice(_CODINGS), "replace")


def _head(content: bytearray, source: random.Random) -> None:
    head = source.choice(_HEADS)
    content[:] = head if source.random() < 0.5 else head + content


_IN_PLACE = _flip, _overwrite, _noise, _swap
_ANY = *_IN_PLACE, _flip, _overwrite, _cut, _remove, _insert, _insert, _double, _coding, _head
