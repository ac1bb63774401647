"""Columns of text, JSON lines, CSV, TSV and Parquet files, row by row, with the place of whatever is wrong in them.

The `datasets` library was tried instead, and not taken: of `prompt` / `a red cat, sitting on a mat, oil painting` it
makes the prompt "oil painting", of short rows and of the prompts "None" and "null" it makes nothing, and of other
damage it says neither line nor file in its exception.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tbcm.data.files import HEAD_BYTES, reason, shown, what_it_is
from tbcm.data.texts import lines
from tbcm.errors import UserError

Row = tuple[int, list[Any]]  # 1-based line or row, values

PACKED = ".gz"


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The values of `columns` in every row, whatever they are, with its place: the line where it begins.

    A column "a.b" that a file does not have is the key "b" of what column "a" holds, an object or the JSON of one. For
    .txt, whose lines are the rows, names of columns are not used. In place of a value that a row lacks stands the
    UserError that says so.

    Raises UserError where the file is malformed, or lacks a column.
    """
    yield from READERS[kind_of(path)](path, columns)


def kind_of(path: Path) -> str:
    """The ending that names the format, such as ".csv" of A.CSV.gz. Raises UserError for one that is not read."""
    ending = Path(path.name.lower().removesuffix(PACKED)).suffix
    if ending not in READERS or (ending == ".parquet" and path.suffix.lower() == PACKED):
        raise UserError(f"{path}: unknown kind of file; give one of {', '.join(KINDS)}")
    return ending


def place(path: Path, where: int) -> str:
    """How a message names a row."""
    return f"{path}, {unit(path)} {where}"


def unit(path: Path) -> str:
    return "row" if path.suffix.lower() == ".parquet" else "line"


def parse_json(text: str, where: str) -> Any:
    """Raises UserError where `text` is not JSON, or nested deeper than Python goes."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets in brackets in ...
        raise UserError(f"{where}: JSON that cannot be read ({reason(error)})") from None


def value_of(row: Mapping[str, Any], column: str, where: str) -> Any:
    """`row[column]`, or else of column "a.b" the key "b" of what is in "a". Raises UserError where there is none."""
    if column in row:
        return row[column]
    for dot in (i for i, character in enumerate(column) if character == "."):
        outer, inner = column[:dot], column[dot + 1 :]
        if outer in row:
            value = row[outer]
            if isinstance(value, str):
                value = parse_json(value, f"{where}: {outer}")
            if value is None:
                return None
            if not isinstance(value, Mapping):
                raise UserError(f"{where}: {outer} is {shown(value)}; {column!r} needs an object there")
            return value_of(value, inner, f"{where}: {outer}")
    raise UserError(f"{where}: no column {column!r}; it has {_names(row)}")


def _values(row: Mapping[str, Any], columns: Sequence[str], where: str) -> list[Any]:
    found: list[Any] = []
    for column in columns:
        try:
            found.append(value_of(row, column, where))
        except UserError as error:
            found.append(error)
    return found


def _read_text(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(lines(path), start=1):
        yield number, [line] * len(columns)


def _read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: give an object such as {{{columns[0]!r}: ...}} a line")
        yield number, _values(row, columns, where)


def _read_csv(path: Path, columns: Sequence[str], delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # its default refuses rows for a large column that nobody asked for
    rows = csv.reader(lines(path, newline=""), strict=True, delimiter=delimiter)
    header: list[str] = []
    while True:
        begins = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}, line {begins}: cannot be read as .csv: {error}") from None
        if not row:  # a blank line
            continue
        if not header:
            header = _header(path, begins, row, columns)
            continue
        if len(row) != len(header):
            quote = "quote fields that contain " + {",": "commas", "\t": "tabs"}[delimiter]
            raise UserError(f"{path}, line {begins}: has {len(row)} fields, the header {len(header)}: {quote}")
        yield begins, _values(dict(zip(header, row, strict=True)), columns, f"{path}, line {begins}")


def _read_tsv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    yield from _read_csv(path, columns, "\t")


def _header(path: Path, line: int, names: list[str], columns: Sequence[str]) -> list[str]:
    names = [name.strip() for name in names]
    for column in columns:
        _require_column(str(path), column, names)
        if (count := names.count(column)) > 1:
            raise UserError(f"{path}, line {line}: the header has {column!r} {count} times; name each column once")
    return names


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with open_parquet(path) as file, explained(path):
        names = file.schema_arrow.names
        for column in columns:
            if (count := names.count(column)) > 1:
                raise UserError(f"{path}: has {count} columns {column!r}; name each column once")
        wanted = [_require_column(str(path), column, names) for column in columns]
        number = itertools.count(1)
        for batch in file.iter_batches(columns=list(dict.fromkeys(wanted))):
            batch.validate(full=True)  # Parquet does not promise that its text is UTF-8
            for row in batch.to_pylist():
                where = next(number)
                yield where, _values(row, columns, f"{path}, row {where}")


def open_parquet(path: Path) -> pq.ParquetFile:
    """Raises UserError where it is missing or none."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    if (kind := what_it_is(head)) and not head.startswith(b"PAR1"):
        raise UserError(f"{path}: is {kind}")
    with explained(path):
        return pq.ParquetFile(path)


class explained:  # noqa: N801 - a context manager
    """Turns whatever pyarrow raises on a damaged file into a UserError that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pa.ArrowException | OSError | ValueError | KeyError | MemoryError | OverflowError):
            raise UserError(f"{self.path}: cannot be read as {self.path.suffix}: {reason(error)}") from None


READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
KINDS = tuple(READERS) + tuple(kind + PACKED for kind in READERS if kind != ".parquet")


def _require_column(where: str, column: str, columns: list[str]) -> str:
    """The column that holds `column`: itself, or of "a.b" perhaps "a"."""
    dots = [i for i, character in enumerate(column) if character == "."]
    for name in [column, *(column[:dot] for dot in dots)]:
        if name in columns:
            return name
    raise UserError(f"{where}: no column {column!r}; it has {_names(columns)}")


def _names(columns: Iterator[str] | Sequence[str] | Mapping[str, Any]) -> str:
    names = [shown(name) for name in itertools.islice(columns, 21)]
    return ", ".join(names[:20]) + ", ..." * (len(names) > 20) or "none"
