"""Prompt files, and which prompts a training step takes.

Files are read once with the standard library (text, CSV, JSON lines) or pyarrow (Parquet) and kept as one Arrow string
array: the bytes of the text plus 8 bytes a prompt. The `datasets` library was considered and not taken: it writes a
second copy of the file into a cache folder, takes seconds to import, may ask the hub, and cannot say which line is bad.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tbcm.errors import UserError

MAX_PROMPT_CHARACTERS = 2_000

Entries = Iterator[tuple[int, Any]]  # (1-based line or row, value)


class PromptSource(Sequence[str]):
    """The prompts of one file, in its order."""

    def __init__(self, prompts: pa.LargeStringArray) -> None:
        self._prompts = prompts

    @classmethod
    def of(cls, path: Path, texts: Iterable[str]) -> PromptSource:
        """`texts`, which were read from `path`. Raises UserError where one cannot be encoded as UTF-8."""
        try:
            return cls(pa.array(texts, type=pa.large_string()))
        except UnicodeEncodeError as error:
            raise UserError(f"{path}: cannot be read as {path.suffix}: {error}") from error

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        picked = self._prompts[index]
        return picked.to_pylist() if isinstance(index, slice) else picked.as_py()


def load_prompts(path: str | Path, column: str = "prompt") -> PromptSource:
    """Read the prompts of a UTF-8 .txt (one a line), .jsonl or .csv file, or of a .parquet file.

    White space around a prompt is stripped; blank and null prompts are dropped.

    Args:
        path: the file; its extension names the format.
        column: the key (.jsonl) or column (.csv, .parquet) that holds the prompts; not used for .txt.

    Raises:
        UserError: the file is missing, unreadable, empty, of an unknown kind, not UTF-8, malformed, lacks the column,
            or holds a prompt that is not text or is longer than `MAX_PROMPT_CHARACTERS`.
    """
    path = Path(path)
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path}: unknown kind of prompt file; give one of {', '.join(_READERS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such prompt file")
    prompts = PromptSource.of(path, _cleaned(path, read_column(path, column)))
    if len(prompts) == 0:
        raise UserError(f"{path}: holds no prompts; give at least one")
    return prompts


def read_column(path: Path, column: str) -> Entries:
    """Every entry of a .txt, .jsonl, .csv or .parquet file with its place, whatever it is. For .txt, `column` is not
    used. Raises UserError where the file is not UTF-8, malformed or lacks the column."""
    try:
        yield from _READERS[path.suffix.lower()](path, column)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {_where_not_utf8(path)}; save the file as UTF-8") from error
    except (OSError, csv.Error, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix}: {error}") from error


def place(path: Path, where: int) -> str:
    """How an error names an entry."""
    return f"{path}, {'row' if path.suffix.lower() == '.parquet' else 'line'} {where}"


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


def _cleaned(path: Path, entries: Entries) -> Iterator[str]:
    """Stripped prompts without the blank ones."""
    for where, value in entries:
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(f"{place(path, where)}: the prompt is {value!r}; give text")
        prompt = value.strip()
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise UserError(
                f"{place(path, where)}: the prompt has {len(prompt):,} characters;"
                f" shorten it to at most {MAX_PROMPT_CHARACTERS:,}"
            )
        if prompt:
            yield prompt


def _read_text(path: Path, column: str) -> Entries:
    with path.open(encoding="utf-8-sig") as file:
        yield from enumerate(file, start=1)


def _read_jsonl(path: Path, column: str) -> Entries:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON: {error.msg} at character {error.pos + 1}") from error
            if not isinstance(entry, dict):
                raise UserError(f"{path}, line {number}: give an object such as {{{column!r}: ...}}")
            _require_column(f"{path}, line {number}", column, list(entry))
            yield number, entry[column]


def _read_csv(path: Path, column: str) -> Entries:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        if rows.fieldnames is not None:
            _require_column(str(path), column, list(rows.fieldnames))
        for row in rows:
            yield rows.line_num, row[column]


def _read_parquet(path: Path, column: str) -> Entries:
    with pq.ParquetFile(path) as file:
        _require_column(str(path), column, file.schema_arrow.names)
        rows = itertools.count(1)
        for batch in file.iter_batches(columns=[column]):
            batch.validate(full=True)  # Parquet does not promise that its text is UTF-8
            for value in batch.column(0).to_pylist():
                yield next(rows), value


_READERS: dict[str, Callable[[Path, str], Entries]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _require_column(where: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise UserError(f"{where}: no column {column!r}; it has {', '.join(map(repr, columns)) or 'none'}")


def _where_not_utf8(path: Path) -> str:
    """Line, offset and value of the first byte that is not UTF-8."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number}, byte {start + error.start:,} (0x{line[error.start]:02x}) is not UTF-8"
            start += len(line)
    raise AssertionError(f"{path} changed while it was read")
