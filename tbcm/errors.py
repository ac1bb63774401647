"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do about it."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


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
