"""Prompt files, read and cleaned.

Files are read once by rank 0 and written clean as an Arrow file, which every process maps into memory: however many
prompts and ranks, a node holds them once, in its page cache.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tbcm.data.captions import TEXTS, PromptSource, as_lists, open_prompts
from tbcm.data.files import find, is_file, shown
from tbcm.data.tables import KINDS, kind_of, place, read_columns, unit
from tbcm.errors import UserError
from tbcm.runtime import distributed
from tbcm.runtime.files import atomic_path

logger = logging.getLogger(__name__)

_SCHEMA = pa.schema([("prompt", TEXTS)])
_PROMPTS_PER_BATCH = 65_536


def load_prompts(path: str | Path, column: str = "prompt", *, folder: str | Path) -> PromptSource:
    """The prompts of .txt (one a line), .jsonl, .csv, .tsv or .parquet files, mapped into memory.

    White space around a prompt is stripped; blank and null prompts are dropped, and their number and that of
    duplicates, which stay, is logged. Every rank calls it. Rank 0 reads the files, unless `folder` has what came of
    them before: the name tells paths, sizes, times of change and column apart.

    Args:
        path: a file, a folder or a pattern (see `tbcm.data.files.find`); endings name the formats (see docs/data.md).
        column: the key (.jsonl) or column (.csv, .tsv, .parquet) that holds the prompts, each a text or a list of
            texts; not used for .txt.
        folder: where the clean prompts are kept, such as the run's folder: every rank must see it.

    Raises:
        UserError: a file is missing, unreadable, of an unknown kind, not text, malformed, lacks the column, or holds
            prompts that are not text; there are no prompts; or a rank sees no `folder`.
    """
    return open_prompts(distributed.run_on_main(lambda: _cleaned_file(path, column, Path(folder))))


def _cleaned_file(path: str | Path, column: str, folder: Path) -> Path:
    """Where the clean prompts of `path` are; made if need be."""
    files = find(path, KINDS, "prompt file")
    for file in files:
        if not is_file(file):
            raise UserError(f"{file}: no such prompt file")
        kind_of(file)
    hashed = hashlib.sha256(column.encode(errors="surrogatepass"))
    for file in files:
        stat = file.stat()
        hashed.update(b"%s %d %d " % (os.fsencode(file.resolve()), stat.st_size, stat.st_mtime_ns))
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", files[0].name.split(".")[0])[:60]
    target = folder / f"{stem}-{hashed.hexdigest()[:12]}.arrow"
    if not target.is_file():
        _Cleaning(str(path), files).write(column, target)
    return target


class _Cleaning:
    """Cleans files, and notes what is told about them once, at their end."""

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        self.name, self.files = name, files
        self.blank = 0
        self.entries = 0
        self.file_of, self.places, self.hashes = array("q"), array("q"), array("q")  # of each prompt

    def write(self, column: str, target: Path) -> None:
        prompts = self._cleaned(column)
        with atomic_path(target) as part:
            with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
                while some := list(itertools.islice(prompts, _PROMPTS_PER_BATCH)):
                    writer.write_batch(pa.record_batch([as_lists(some)], schema=_SCHEMA))
            if not self.places:
                raise UserError(f"{self.name}: holds no prompts; give at least one")
        self._report()

    def _cleaned(self, column: str) -> Iterator[str | list[str]]:
        """The text of each entry, or its texts; stripped and without blank ones."""
        for number, file in enumerate(self.files):
            for where, (value,) in read_columns(file, [column]):
                if isinstance(value, str) and value.isascii() and "\0" not in value:  # as nearly all are
                    texts = [text] if (text := value.strip()) else []
                else:
                    texts = texts_of(value, f"{place(file, where)}: the prompt")
                if not texts:
                    self.blank += 1
                    continue
                self.entries += 1
                for text in texts:
                    self.file_of.append(number)
                    self.places.append(where)
                    self.hashes.append(hash(text))
                yield texts if len(texts) > 1 else texts[0]

    def _report(self) -> None:
        hashes = np.frombuffer(self.hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        again = np.sort(order[1:][hashes[order[1:]] == hashes[order[:-1]]])  # all but the first of each
        several = f" with {len(hashes):,} texts" if len(hashes) > self.entries else ""
        of = f" in {len(self.files):,} files" if len(self.files) > 1 else ""
        blank = f", {self.blank:,} blank ones dropped" if self.blank else ""
        duplicates = f", duplicates among them: {self._places(again)}" if len(again) else ""
        logger.info("%s: %s prompts%s%s%s%s", self.name, f"{self.entries:,}", several, of, blank, duplicates)

    def _places(self, texts: np.ndarray) -> str:
        """How many, and the first few."""
        first = [(self.files[self.file_of[i]], self.places[i]) for i in texts[:3]]
        if len(self.files) == 1:
            told = f"{unit(self.files[0])} " + ", ".join(str(where) for _, where in first)
        else:
            told = ", ".join(place(file, where) for file, where in first)
        return f"{len(texts):,} ({told}{', ...' * (len(texts) > 3)})"


def texts_of(value: Any, what: str) -> list[str]:
    """A prompt or caption, or a list of some: stripped, without blank ones; none where there is none.

    Raises `value` where it is a UserError, and one that begins with `what` where it is no text.
    """
    if isinstance(value, UserError):
        raise value
    found = []
    for text in value if isinstance(value, list | tuple) else [value]:
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f"{what} is {shown(value)}; give text")
        if "\0" in text:
            raise UserError(f"{what} is {shown(text)}, which has NUL bytes; give text")
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can hold halves of surrogate pairs
            raise UserError(f"{what} is {shown(text)}, which is no Unicode text; give text") from None
        if stripped := text.strip():
            found.append(stripped)
    return found
