"""One column of a text, JSON lines, CSV or Parquet file, entry by entry, with the place of whatever is wrong in it."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tbcm.errors import UserError

Entries = Iterator[tuple[int, Any]]  # (1-based line or row, value)


def read_column(path: Path, column: str) -> Entries:
    """Every entry of a .txt, .jsonl, .csv or .parquet file with its place, whatever it is. For .txt, `column` is not
    used. Raises UserError where the file is not UTF-8, malformed or lacks the column."""
    try:
        yield from READERS[path.suffix.lower()](path, column)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {_where_not_utf8(path)}; save the file as UTF-8") from error
    except (OSError, csv.Error, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix}: {error}") from error


def place(path: Path, where: int) -> str:
    """How a message names an entry."""
    return f"{path}, {unit(path)} {where}"


def unit(path: Path) -> str:
    return "row" if path.suffix.lower() == ".parquet" else "line"


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


READERS: dict[str, Callable[[Path, str], Entries]] = {
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
