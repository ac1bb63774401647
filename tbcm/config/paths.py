"""Paths as people write them: in a configuration, as an override and on a command line.

Every path and hub id that a user gives goes through `user_path`: `UserPath`, `UserData` and `UserFolder` are its types
in a configuration, `path_argument` and `source_argument` are those of command lines.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from tbcm.errors import UserError, shown

LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes, on Linux."""


def user_path(text: str) -> str:
    """`text` with ~ and ~user replaced by the home folder. For paths and hub ids alike.

    Raises:
        ValueError: no path can be this, or there is no such user.
    """
    if not text.strip():
        raise ValueError("a path that is not empty")
    if "\0" in text:
        raise ValueError("a path without NUL characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a path in UTF-8: rename what has other bytes in its name") from None
    path = _at_home(text) if text.startswith("~") else text
    if len(path.encode()) > LONGEST_PATH or any(len(name.encode()) > LONGEST_NAME for name in path.split("/")):
        raise ValueError(f"a path of at most {LONGEST_PATH:,} bytes, and {LONGEST_NAME} in each name")
    return path


def _at_home(text: str) -> str:
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        user = text.partition("/")[0]
        raise ValueError(
            f"a path: nobody called {user[1:]!r} has a home, and a name that begins with ~ is written ./~"
        ) from None


def resolved(path: str) -> str:
    """Its absolute path, links followed, where `path` names something on this disk: else (a hub id, 'icons') `path`
    itself."""
    found = path != "icons" and os.path.exists(path)  # noqa: PTH110 (Path.exists raises where it may not look)
    return os.path.realpath(path) if found else path


def teacher_folder(path: str) -> Path:
    """Where the teacher called `path` lies, if it is on this disk: 'icons' is the shipped one."""
    return Path(str(resources.files("tbcm.icons") / "assets" / "teacher") if path == "icons" else path)


def located(path: str) -> str:
    """The absolute path of data ('icons' is itself): of a pattern, or of what is missing, that of the folders which are
    there, links followed, and the rest as it is written. Names in front of it that look like patterns stay names, for
    `tbcm.data.files.expand` takes what is there as it is written."""
    if path == "icons":
        return path
    there, parts = "", Path(path).parts
    while parts and os.path.lexists(os.path.join(there, parts[0])):  # noqa: PTH118 (Path("") / x is no different)
        there, parts = os.path.join(there, parts[0]), parts[1:]  # noqa: PTH118
    return str(Path(os.path.realpath(there), *parts))


UserPath = Annotated[str, AfterValidator(user_path), AfterValidator(resolved)]
"""A path, hub id or 'icons' in a configuration. Resolved, as all paths are, so that a run's configuration means the
same from everywhere."""

UserData = Annotated[str, AfterValidator(user_path), AfterValidator(located)]
"""A path or pattern of files, or 'icons', in a configuration."""

UserFolder = Annotated[str, AfterValidator(user_path), AfterValidator(os.path.realpath)]
"""A folder in a configuration, which may be yet to make."""


def source_argument(text: str) -> str:
    """A path, hub id or 'icons' on a command line. Raises UserError."""
    try:
        return user_path(text)
    except ValueError as error:
        raise UserError(f"{shown(text)}: should be {error}") from None


def path_argument(text: str) -> Path:
    """A path on a command line. Raises UserError."""
    return Path(source_argument(text))


def text_argument(text: str) -> str:
    """Text on a command line, such as a prompt. Raises UserError where the shell gave bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{shown(text)}: is not UTF-8 text") from None
    return text
