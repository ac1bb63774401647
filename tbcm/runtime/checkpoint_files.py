"""A checkpoint as files: its manifest, what is wrong with it, which of them a run has and which it keeps."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import tbcm
from tbcm.errors import UserError
from tbcm.runtime.files import write_json
from tbcm.runtime.leftovers import discard, warn_once

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 2
_MEND = "resume from an earlier checkpoint"

Entry = dict[str, Any]
"""Of a file, in the manifest: its "bytes" and "sha256"."""


def describe_files(folder: Path, rank: int) -> dict[str, Entry]:
    """The files in `folder` that `rank` wrote, by name. Those without a rank in their name are rank 0's."""
    paths = (path for path in folder.iterdir() if _writer_of(path.name) == rank)
    # One after the other: a process that is about to end lets a thread finish, but start no pool of threads.
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def _writer_of(name: str) -> int:
    match = re.match(r"__(\d+)_", name)
    return int(match[1]) if match else 0


def write_manifest(folder: Path, step: int, config: dict[str, Any], files: dict[str, Entry], **more: Any) -> None:
    manifest = {
        "format": _FORMAT,
        "step": step,
        "versions": {"tbcm": tbcm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        **more,
        "files": dict(sorted(files.items())),
        "config": config,
    }
    write_json(folder / MANIFEST, manifest | {"sha256": _self_digest(manifest)})


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: there is none, it is not as it was written, or it is of another format.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise UserError(f"{checkpoint} is not a checkpoint (it has no {MANIFEST}): give a run or a step-* folder")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = manifest.pop("sha256") == _self_digest(manifest)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    except OSError as error:
        raise UserError(f"checkpoint file {path} cannot be read ({error.strerror}): {_MEND}") from error
    if not whole:
        raise UserError(f"checkpoint file {path} is damaged: {_MEND}")
    if manifest["format"] != _FORMAT:
        raise UserError(f"{path} has format {manifest['format']}, not {_FORMAT}: use the tbcm version that wrote it")
    return manifest


def check_files(checkpoint: Path, entries: Iterable[tuple[str, Entry]]) -> None:
    """
    Raises:
        UserError: one of these files, which it names, is not as it was written.
    """
    files = {checkpoint / name: entry for name, entry in entries}
    for file, entry in files.items():
        if not file.is_file():
            raise UserError(f"checkpoint file {file} is missing: {_MEND}")
        if (size := file.stat().st_size) != entry["bytes"]:
            raise UserError(f"checkpoint file {file} has {size} bytes, not the {entry['bytes']} written: {_MEND}")
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        for (file, entry), digest in zip(files.items(), pool.map(_sha256_or_error, files), strict=True):
            if isinstance(digest, OSError):
                raise UserError(f"checkpoint file {file} cannot be read ({digest.strerror}): {_MEND}")
            if digest != entry["sha256"]:
                raise UserError(f"checkpoint file {file} is damaged (its SHA-256 differs): {_MEND}")


def checkpoints_in(root: Path) -> dict[int, Path]:
    """By step, whole or not: folders, and links to where folders are or were."""
    named = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in root.glob("step-*"))
    ours = ((int(match[1]), path) for match, path in named if match and path.name == name_of(int(match[1])))
    return {step: path for step, path in ours if path.is_symlink() or path.is_dir()}


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def prune(root: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Leaves those to be kept, now that `step` is written. What cannot be removed is a warning (see `discard`)."""
    checkpoints = checkpoints_in(root)
    for later in filter(lambda other: other > step, list(checkpoints)):
        # Left by a run that was resumed from before them: were they kept, the next resume would go back to them.
        path = checkpoints.pop(later)
        stale = path.with_name(f"stale-{path.name}")
        try:
            discard(stale)
            path.rename(stale)
        except OSError as error:
            why = f"and cannot be renamed ({error.strerror}): move it away, or the next resume goes back to it"
            warn_once(path, f"is later than the run is now, {why}")
        else:
            logger.warning("%s is later than the run is now: renamed to %s", path, stale.name)
    for old in sorted(checkpoints)[: -max(1, keep_last)]:
        if not (keep_every and old % keep_every == 0):
            discard(checkpoints[old])


def _self_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256_or_error(path: Path) -> str | OSError:
    try:
        return _sha256(path)
    except OSError as error:
        return error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
