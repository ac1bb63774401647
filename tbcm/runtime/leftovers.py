"""What a process that is killed leaves behind: the names that it has, and how it goes again."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\.tbcm-[0-9a-f]{32}-(part|old)(\.\w{1,12})?")
"""The whole name of what is half-written or half-deleted (part), or of a folder that holds, under its own name, what is
being replaced (old). Nobody else gives such names, so what has one may be deleted; nothing else may."""


def temporary(path: Path, kind: Literal["part", "old"] = "part") -> Path:
    """A new name beside `path`, which `remove_leftovers` knows. Short, so that any `path` has one."""
    # Random, not the process id: those repeat across the hosts and containers that share a file system.
    suffix = path.suffix if kind == "part" and re.fullmatch(r"\.\w{1,12}", path.suffix) else ""
    return path.with_name(f".tbcm-{secrets.token_hex(16)}-{kind}{suffix}")


def remove_leftovers(*folders: Path) -> None:
    """Removes what a process that was killed while it wrote or deleted has left in these, but not below, and puts back
    what it had not replaced yet. Each is logged; what cannot be removed is a warning.

    For who holds the folders' `RunLock`: nobody else may be writing there.
    """
    for path in [path for folder in folders for path in _leftovers(folder)]:
        try:
            for restored in put_back(path):
                logger.warning("%s: put back as it was before a process that replaced it was killed", restored)
        except OSError as error:
            _stays(path, error)
        else:
            if discard(path):
                logger.info("%s: removed; a process that was killed had left it", path)


def discard(path: Path) -> bool:
    """Deletes what is at `path`, if anything, so that a kill leaves nothing half-deleted under that name. Of a link,
    the link alone. Returns whether it is gone; that it is not is a warning, once."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return True
        doomed = path if _TEMPORARY.fullmatch(path.name) else path.rename(temporary(path))
    except OSError as error:
        _stays(path, error)
        return False
    try:
        shutil.rmtree(doomed)
    except OSError as error:
        shutil.rmtree(doomed, ignore_errors=True)  # all that can be, such as all but what a network disk holds open
        _stays(doomed, error)
    return not doomed.exists()


def _leftovers(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name))
    except OSError:  # there is no such folder; or whoever writes to it will be told
        return []


def put_back(old: Path) -> list[Path]:
    """What `old` holds (see `temporary`) and nothing has taken the place of."""
    match = _TEMPORARY.fullmatch(old.name)
    if not match or match[1] != "old" or old.is_symlink() or not old.is_dir():
        return []
    kept = [(path, old.with_name(path.name)) for path in old.iterdir()]
    return [path.rename(place) for path, place in kept if not os.path.lexists(place)]


_warned: set[Path] = set()


def warn_once(path: Path, message: str) -> None:
    """Logs a warning, "`path` `message`", unless there was one of `path` before."""
    if path not in _warned:
        _warned.add(path)
        logger.warning("%s %s", path, message)


def _stays(path: Path, error: OSError) -> None:
    warn_once(path, f"cannot be removed ({error.strerror or error}): it stays")
