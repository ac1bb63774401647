"""JSON files of model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tbcm.errors import UserError, first_line


def read_json(file: Path, name: str | None = None) -> dict[str, Any]:
    """An object. Raises UserError, with file (called `name` there) and position, where it is not one or not there."""
    name = name or str(file)
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"{name}: cannot be read: {reason}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; a thousand brackets
        raise UserError(f"{name}: not JSON that can be read: {first_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{name}: should hold a JSON object, not {type(tree).__name__}")
    return tree
