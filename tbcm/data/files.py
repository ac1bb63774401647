"""Which files a path names, and what a file is that is not what its name says."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tbcm.errors import UserError

logger = logging.getLogger(__name__)

MAX_FILES = 100_000

_BRACES = re.compile(r"\{(?:(?P<first>[0-9]+)\.\.(?P<last>[0-9]+)|(?P<choice>[^{},]*(?:,[^{},]*)+))\}")
_PIECES = re.compile(r"([0-9]+)?([^0-9]*)")
_WILD = re.compile(r"[*?\[]")
_SPLITS = "train", "data"  # Hugging Face's folders of a data set's training part
_SIGNS = (
    (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer, not the file it stands for: run git lfs pull"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"\x1f\x8b", "compressed with gzip: unpack it, or end the name of a text file in .gz"),
    (b"BZh", "compressed with bzip2: unpack it"),
    (b"\xfd7zXZ\0", "compressed with xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"%PDF-", "a PDF: give its text"),
    (b"PAR1", "a Parquet file: end its name in .parquet"),
)
_PAGES = b"<!doctype html", b"<html", b"<head", b"<?xml"
HEAD_BYTES = 512


def what_it_is(head: bytes) -> str | None:
    """What a file that starts with `head` is, and what to do, where it is a well-known kind that has no place here."""
    for sign, kind in _SIGNS:
        if head.startswith(sign):
            return kind
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(_PAGES):
        return "a web page, such as a failed download leaves: download it again"
    return None


def find(path: str | Path, kinds: Iterable[str], holds: str) -> list[Path]:
    """The files that `path` names: a file, a folder (its own files of one of `kinds`), or a pattern.

    A pattern has *, ?, [abc] and ** (any folders), ranges {00000..00041} and choices {a,b}; what stands there as it is
    written is taken so first. Files come in natural order, in which numbers count as numbers, 2.txt before 10.txt, and
    those of ranges and choices in theirs. Hidden files are nobody's data. Of a folder that has no such files, its
    train/ or data/ is taken, and of files called train... and others beside them only the first.

    Args:
        kinds: endings in lower case, such as ".txt".
        holds: what the files hold, for messages.

    Raises:
        UserError: there is none, a folder holds several kinds, or the path is none that this system takes.
    """
    kinds = tuple(kinds)
    found = expand(path)
    if not found:
        raise UserError(f"{path}: no such {holds}")
    if len(found) == 1 and is_folder(found[0]):
        return _of_folder(found[0], kinds, holds)
    return found


def expand(path: str | Path) -> list[Path]:
    """What there is at a path or pattern, in natural order. Members of a range or choice are not looked for.

    Raises UserError where the path is none that this system takes.
    """
    given = Path(home(path))
    try:
        if _exists(given):
            return [given]
        found = [Path(given.anchor)]
        listed = False  # members of a range are expected, even where they are missing
        for part in given.parts[len(found[0].parts) :]:
            listed = listed or (_BRACES.search(part) is not None and not all(_exists(f / part) for f in found))
            found = list(itertools.islice(_below(found, part, listed), MAX_FILES + 1))
            if len(found) > MAX_FILES:
                raise UserError(f"{path}: names more than {MAX_FILES:,} files; give fewer")
    except (OSError, ValueError) as error:  # too long a name, a NUL byte
        raise UserError(f"{shown(path)}: not a path ({reason(error)})") from None
    return found


def home(path: str | Path) -> Path:
    """`path` with ~ as the home folder, where there is one of that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for names that are too long


def is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113


def natural(path: Path) -> list[tuple[list[tuple[float, str]], str]]:
    """Key of the natural order: part by part, numbers as numbers, and before letters."""

    def key(part: str) -> list[tuple[float, str]]:
        return [(int(number) if number else math.inf, text) for number, text in _PIECES.findall(part)]

    return [(key(part), part) for part in path.parts]


def own_files(folder: Path, kinds: tuple[str, ...]) -> list[Path]:
    """The files of a folder whose names end in one of `kinds`, without hidden ones, in natural order."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not e.name.startswith(".") and e.name.lower().endswith(kinds)]
    return sorted((file for file in map(folder.joinpath, names) if is_file(file)), key=natural)


def training_part(folder: Path) -> list[Path]:
    """The folder itself, and where Hugging Face's layouts keep the training part of a data set below it."""
    return [folder, *(folder / name for name in _SPLITS if is_folder(folder / name))]


def of_training(files: Sequence[Path]) -> list[Path]:
    """Those called train..., where some are and others are not."""
    train = [file for file in files if re.match(r"train\b|train[-_.]", file.name, re.IGNORECASE)]
    if train and len(train) < len(files):
        logger.info("%s: takes the files train...; %s others stay", files[0].parent, f"{len(files) - len(train):,}")
    return train or list(files)


def reason(error: BaseException) -> str:
    """One line of what went wrong, without an object's address and without the path, which the message has."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "it", str(text))


def shown(value: object, length: int = 80) -> str:
    """`value` in a message: as Python writes it, cut to about `length` characters."""
    text = repr(value[: length + 1] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= length else f"{text[:length]}..."


def _of_folder(folder: Path, kinds: tuple[str, ...], holds: str) -> list[Path]:
    for part in training_part(folder):
        files = of_training(own_files(part, kinds))
        there = sorted({kind for kind in kinds if any(file.name.lower().endswith(kind) for file in files)})
        plain = {kind.removesuffix(".gz") for kind in there}
        if len(plain) > 1:
            raise UserError(f"{part}: holds {' and '.join(there)}; say which, such as {part / ('*' + there[0])}")
        if files:
            return files
    raise UserError(f"{folder}: no {holds} in this folder ({', '.join(kinds)})")


def _below(folders: Iterable[Path], part: str, listed: bool) -> Iterator[Path]:
    """What `part` of a pattern names in each folder; what is not there too, where it is `listed`."""
    for folder in folders:
        for name in [part] if _exists(folder / part) else _braces(part):
            if _exists(folder / name) or (listed and not (_WILD.search(name) and _exists(folder))):
                yield folder / name
            elif name == "**":
                yield from sorted((p for p in folder.glob("**") if not _hidden(p, folder)), key=natural)
            elif _WILD.search(name):
                found = [p for p in folder.glob(name) if not p.name.startswith(".") or name.startswith(".")]
                yield from sorted(found, key=natural)


def _braces(text: str) -> Iterator[str]:
    """`text` with its first range or choice replaced by each of its members, and so on."""
    if not (match := _BRACES.search(text)):
        yield text
        return
    for member in _members(match):
        yield from _braces(text[: match.start()] + member + text[match.end() :])


def _members(match: re.Match[str]) -> Iterable[str]:
    if match["choice"]:
        return match["choice"].split(",")
    first, last = int(match["first"]), int(match["last"])
    step = 1 if first <= last else -1
    return (f"{n:0{len(match['first'])}d}" for n in range(first, last + step, step))


def _hidden(path: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def _exists(path: Path) -> bool:
    """Path.exists, but an error where the name cannot be one. A link that leads nowhere is there."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
