"""Which model it is, whatever path leads to it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BLOCKS, _BLOCK = 1024, 1024
"""Of a file that is larger than that, so many blocks of so many bytes are read, evenly spaced: training changes weights
all over."""

ModelIdentity = dict[str, str | None]


def model_identity(location: str, revision: str | None, parts: Sequence[str]) -> ModelIdentity:
    """What tells the `parts` (subfolders) of a model from another's, in JSON: its resolved "path" or hub id, and of a
    folder the fingerprint of its "files" (names, sizes and a sample of the contents), where there are any."""
    folder = Path(location)
    if not folder.is_dir():
        return {"path": location + f"@{revision}" * bool(revision), "files": None}
    files = sorted(file for part in parts for file in (folder / part).glob("[!.]*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        digest.update(_sample(file))
    return {"path": os.path.realpath(folder), "files": digest.hexdigest()[:16] if files else None}


def same_model(one: Any, other: Any) -> bool:
    """Whether two identities are of one model: by their files where both are known, else by their paths.

    An identity that an earlier version wrote is a path alone.
    """
    one, other = ({"path": each, "files": None} if isinstance(each, str) else each for each in (one, other))
    if one is None or other is None:
        return one is other
    if one["files"] and other["files"]:
        return bool(one["files"] == other["files"])
    return os.path.realpath(one["path"]) == os.path.realpath(other["path"])


def key_of_model(identity: Mapping[str, str | None]) -> str:
    """The same for the same files, wherever they lie."""
    return str(identity["files"] or identity["path"])


def _sample(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= _BLOCKS * _BLOCK:
            return opened.read()
        parts = []
        for block in range(_BLOCKS):
            opened.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
            parts.append(opened.read(_BLOCK))
        return b"".join(parts)
