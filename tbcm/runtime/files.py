"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tbcm.runtime.leftovers import discard, put_back, temporary
from tbcm.runtime.write_errors import explain_os_errors


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` (same suffix) for the caller to write a file to.

    On success the file is synced to disk and takes `path`'s place in one step; on failure it is removed and an old
    file at `path` is left as it was. Missing parent folders are made. A link at `path` is replaced, not followed.

    Raises:
        UserError: the disk is full or read-only, or permission is missing.
    """
    path = Path(path)
    part = temporary(path)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            _sync(part)
            part.replace(path)
            _sync(path.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new, empty temporary folder beside `path`; on success it takes `path`'s place, on failure it is removed.

    Everything in it is synced to disk first. What is at `path` already is replaced (and gone for an instant; a reader
    never sees a mixture): of a link the link alone, not what it leads to.

    Raises:
        UserError: the disk is full or read-only, or permission is missing.
    """
    path = Path(path)
    part, old = temporary(path), temporary(path, "old")
    with explain_os_errors(path):
        part.mkdir(parents=True)
        try:
            yield part
            _sync_tree(part)
            if os.path.lexists(path):
                old.mkdir()
                path.replace(old / path.name)
            part.replace(path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            with suppress(OSError):
                put_back(old)
                old.rmdir()
            raise
        discard(old)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `obj` as indented JSON, atomically."""
    text = json.dumps(obj, indent=2) + "\n"
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for child in folder.rglob("*"):
        _sync(child)
    _sync(folder)
