"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import functools
import reprlib
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do about it."""

    def __str__(self) -> str:
        line = " ".join(super().__str__().split())
        # Input is quoted in it, which may hold what would move a terminal's cursor, or cannot be written at all.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 2, 300, 100


def shown(value: object) -> str:
    """`repr(value)` for a message: of bounded length, and without what cannot be printed."""
    try:
        text = _repr.repr(value)
    except ValueError:  # Python refuses to write out integers of thousands of digits
        text = f"a value of type {type(value).__name__}"
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 400 else f"{text[:400]}..."


def first_line(error: BaseException) -> str:
    """What an error of a library says, in short: its first line, or its type where it says nothing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) < 300 else f"{line[:300]}..."


def command(main: Callable[[], int | None]) -> Callable[[], int]:
    """Decorates a command line's `main`: a `UserError` is one line on stderr and exit code 2, Ctrl-C exit code 130."""

    @functools.wraps(main)
    def run() -> int:
        try:
            return main() or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run
