"""Prompt files, and which prompts a training step takes.

A file is read once by rank 0, with the standard library (text, CSV, JSON lines) or pyarrow (Parquet), and written clean
as an Arrow file, which every process maps into memory: however many prompts and ranks, a node holds them once, in its
page cache. The `datasets` library was considered and not taken: it takes seconds to import, may ask the hub, and cannot
say which line is bad.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa

from tbcm.data.tables import READERS, Entries, place, read_column, unit
from tbcm.errors import UserError
from tbcm.runtime import distributed
from tbcm.runtime.files import atomic_path

logger = logging.getLogger(__name__)

MAX_PROMPT_CHARACTERS = 2_000

_SCHEMA = pa.schema([("prompt", pa.large_string())])
_PROMPTS_PER_BATCH = 65_536


class PromptSource(Sequence[str]):
    """The prompts of one file, in its order."""

    def __init__(self, prompts: pa.LargeStringArray | pa.ChunkedArray) -> None:
        self._prompts = prompts

    @classmethod
    def of(cls, path: Path, texts: Iterable[str]) -> PromptSource:
        """`texts`, which were read from `path`. Raises UserError where one cannot be encoded as UTF-8."""
        try:
            return cls(pa.array(texts, type=pa.large_string()))
        except UnicodeEncodeError as error:
            raise UserError(f"{path}: cannot be read as {path.suffix}: {error}") from error

    @property
    def arrow(self) -> pa.LargeStringArray | pa.ChunkedArray:
        return self._prompts

    def digest(self) -> str:
        return digest(self)

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _PROMPTS_PER_BATCH):
            yield from self[start : start + _PROMPTS_PER_BATCH]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        picked = self._prompts[index]
        return picked.to_pylist() if isinstance(index, slice) else picked.as_py()


def load_prompts(path: str | Path, column: str = "prompt", *, folder: str | Path) -> PromptSource:
    """The prompts of a UTF-8 .txt (one a line), .jsonl or .csv file, or of a .parquet file, mapped into memory.

    White space around a prompt is stripped; blank and null prompts are dropped, and their number and that of
    duplicates, which stay, is logged. Every rank calls it. Rank 0 reads the file, unless `folder` has what came of it
    before: the name tells path, size, time of change and column apart.

    Args:
        path: the file; its extension names the format.
        column: the key (.jsonl) or column (.csv, .parquet) that holds the prompts; not used for .txt.
        folder: where the clean prompts are kept, such as the run's folder: every rank must see it.

    Raises:
        UserError: the file is missing, unreadable, empty, of an unknown kind, not UTF-8, malformed, lacks the column,
            or holds prompts that are not text or are longer than `MAX_PROMPT_CHARACTERS`; or a rank sees no `folder`.
    """
    return open_prompts(distributed.run_on_main(lambda: _cleaned_file(Path(path), column, Path(folder))))


def digest(prompts: Iterable[str]) -> str:
    """Tells these prompts, in their order, from others. Takes a second for a million."""
    hashed = hashlib.sha256()
    for prompt in prompts:
        text = prompt.encode()
        hashed.update(b"%d " % len(text) + text)
    return hashed.hexdigest()[:16]


def open_prompts(file: Path) -> PromptSource:
    """The first column of an Arrow file, without reading it."""
    try:
        return PromptSource(map_table(file).column(0))
    except FileNotFoundError:
        raise UserError(f"{file}: not seen by this process: all nodes must share the folder it is in") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: damaged ({error}); remove it to have it made again") from None


def map_table(file: Path) -> pa.Table:
    """An Arrow file, mapped into memory: what is not asked for is not read."""
    with pa.memory_map(str(file)) as mapped:
        return pa.ipc.open_file(mapped).read_all()


def batch_indices(num_prompts: int, prompts_per_step: int, step: int, seed: int) -> list[int]:
    """The prompts of global batch `step` (0-based): `prompts_per_step` indices into [0, num_prompts).

    The epochs' shuffled orders (`prompt_order`) are laid end to end and cut into batches, so nothing is dropped and a
    batch may run over the end of an epoch, or over several where prompts are few. A function of its arguments alone:
    a run can be resumed at any step, and the number of ranks does not matter.
    """
    position, end = step * prompts_per_step, (step + 1) * prompts_per_step
    indices: list[int] = []
    while position < end:
        epoch, offset = divmod(position, num_prompts)
        piece = prompt_order(num_prompts, seed, epoch)[offset : offset + end - position].tolist()
        indices += piece
        position += len(piece)
    return indices


@lru_cache(maxsize=2)  # a step touches one epoch, or two at its end; shuffling a million prompts takes 20 ms
def prompt_order(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the prompts in one epoch: a permutation of [0, num_prompts), int64, read-only."""
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(num_prompts)
    order.flags.writeable = False
    return order


def _cleaned_file(path: Path, column: str, folder: Path) -> Path:
    """Where the clean prompts of `path` are; made if need be."""
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: unknown kind of prompt file; give one of {', '.join(READERS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such prompt file")
    stat = path.stat()
    source = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {column}"
    target = folder / f"{path.stem}-{hashlib.sha256(source.encode()).hexdigest()[:12]}.arrow"
    if not target.is_file():
        _Cleaning(path).write(read_column(path, column), target)
    return target


class _Cleaning:
    """Cleans one file, and notes what is told about it once, at its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blank = 0
        self.too_long: list[tuple[int, int]] = []  # (where, characters)
        self.places, self.hashes = array("q"), array("q")  # of each prompt

    def write(self, entries: Entries, target: Path) -> None:
        prompts = self._cleaned(entries)
        with atomic_path(target) as part:
            with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
                while some := list(itertools.islice(prompts, _PROMPTS_PER_BATCH)):
                    writer.write_batch(pa.record_batch([PromptSource.of(self.path, some).arrow], schema=_SCHEMA))
            self._check()
        self._report()

    def _cleaned(self, entries: Entries) -> Iterator[str]:
        """Stripped prompts without the blank ones."""
        for where, value in entries:
            if value is not None and not isinstance(value, str):
                raise UserError(f"{place(self.path, where)}: the prompt is {value!r}; give text")
            prompt = (value or "").strip()
            if len(prompt) > MAX_PROMPT_CHARACTERS:
                self.too_long.append((where, len(prompt)))
            elif prompt:
                self.places.append(where)
                self.hashes.append(hash(prompt))
                yield prompt
            else:
                self.blank += 1

    def _check(self) -> None:
        if self.too_long:
            (where, characters), *others = self.too_long
            more = f"; more are too long: {self._places([where for where, _ in others])}" if others else ""
            raise UserError(
                f"{place(self.path, where)}: the prompt has {characters:,} characters;"
                f" shorten it to at most {MAX_PROMPT_CHARACTERS:,}{more}"
            )
        if not self.places:
            raise UserError(f"{self.path}: holds no prompts; give at least one")

    def _report(self) -> None:
        hashes = np.frombuffer(self.hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        again = np.sort(order[1:][hashes[order[1:]] == hashes[order[:-1]]])  # all but the first of each
        duplicates = f", duplicates among them: {self._places(np.asarray(self.places)[again])}" if len(again) else ""
        blank = f", {self.blank:,} blank ones dropped" if self.blank else ""
        logger.info("%s: %s prompts%s%s", self.path, f"{len(hashes):,}", blank, duplicates)

    def _places(self, places: Sequence[int] | np.ndarray) -> str:
        """How many, and the first few."""
        first = ", ".join(str(where) for where in places[:3]) + ", ..." * (len(places) > 3)
        return f"{len(places):,} ({unit(self.path)} {first})"
