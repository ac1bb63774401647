"""Checkpoints: whole or absent, checked when read, and restored bit for bit.

    RUN/checkpoints/step-00000123/manifest.json     step, configuration, versions; size and SHA-256 of every file
                                  .metadata *.distcp  torch.distributed.checkpoint's files: every tensor and number

Every rank writes its share of the tensors and any number of ranks may read them; the rest is done by rank 0.
DCP's files hold pickles: load only checkpoints that you trust.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import tbcm
from tbcm.errors import UserError
from tbcm.runtime import distributed
from tbcm.runtime.files import TEMPORARY_PREFIX, atomic_folder, explain_os_errors, remedy, write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 1


def save(
    folder: str | os.PathLike[str],
    step: int,
    state: dict[str, Any],
    *,
    config: dict[str, Any],
    keep_last: int = 2,
    keep_every: int | None = None,
) -> Path:
    """Writes RUN/checkpoints/step-`step` for the run in `folder`, then deletes those not to be kept.

    Every rank calls it. The new checkpoint is complete before an old one goes, so the disk holds `keep_last` + 1.

    Args:
        step: number of updates done.
        state: by name, objects with `state_dict` (modules, optimisers, EMA) or nested dictionaries of tensors, numbers
            and strings.
        config: what the run was started with (JSON types); kept in the manifest for people and for `load`'s caller.
        keep_last: how many of the newest checkpoints stay (>= 1).
        keep_every: those whose step is a multiple of it stay too.

    Raises:
        UserError: it cannot be written; earlier checkpoints are untouched.
    """
    root = Path(folder) / "checkpoints"
    target = root / f"step-{step:08d}"
    with ExitStack() as stack:

        def begin() -> Path:
            _remove_leftovers(root)
            return stack.enter_context(atomic_folder(target))

        def finish() -> None:
            write_json(part / MANIFEST, _manifest(part, step, config))
            stack.close()

        part = distributed.run_on_main(begin)
        _write_state(part, target, state)
        distributed.run_on_main(finish)
    distributed.run_on_main(lambda: _prune(root, step, keep_last, keep_every))
    return target


def load(path: str | os.PathLike[str], state: dict[str, Any]) -> dict[str, Any]:
    """Restores `state` in place from a checkpoint folder, or from the newest whole checkpoint of a run's folder.

    `state` is as for `save`, with everything of the right shape already there; it may name fewer things than were
    saved (only "ema", to sample). Every rank calls it.

    Returns:
        The manifest: "step", "config", "versions" and so on.

    Raises:
        UserError: nothing to load, a damaged file (named), or a checkpoint of another model or optimiser.
    """

    def find() -> tuple[Path, dict[str, Any]]:
        given = Path(path)
        if not (given / "checkpoints").is_dir():
            return given, _verify(given)
        found = _newest_whole(given)
        if found is None:
            raise UserError(f"no checkpoint in {given / 'checkpoints'}: start the run without resuming")
        return found

    checkpoint, manifest = distributed.run_on_main(find)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=not distributed.is_initialized())
    except CheckpointException as error:
        raise UserError(
            f"checkpoint {checkpoint} does not fit this model or optimizer ({_first_failure(error)}): "
            f"use the configuration in its {MANIFEST}"
        ) from error
    return manifest


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint of the run in `folder`, or None where none was saved; every rank calls it.

    A damaged one is passed over with a logged warning. Reads every byte of the checkpoint it returns.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found = distributed.run_on_main(lambda: _newest_whole(Path(folder)))
    return found[0] if found else None


def _write_state(part: Path, target: Path, state: dict[str, Any]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(state, storage_writer=dcp.FileSystemWriter(part), no_dist=not distributed.is_initialized())
    except CheckpointException as error:
        causes = [failure for failure, _ in error.failures.values()]
        # Another rank's exception arrives without the OSError that caused it; its text is all there is.
        advice = next(filter(None, map(remedy, causes)), f"{_first_failure(error)}; is the disk full?")
        raise UserError(f"cannot write {target}: {advice} (earlier checkpoints are untouched)") from error


def _first_failure(error: CheckpointException) -> str:
    failure = next(iter(error.failures.values()))[0]
    return str(failure).strip().split("\n")[0] or type(failure).__name__


def _manifest(part: Path, step: int, config: dict[str, Any]) -> dict[str, Any]:
    paths = sorted(path for path in part.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL, and ranks have written one file each
        digests = list(pool.map(_sha256, paths))
    manifest = {
        "format": _FORMAT,
        "step": step,
        "versions": {"tbcm": tbcm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "ranks": distributed.world_size(),
        "files": {
            path.relative_to(part).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        },
        "config": json.loads(json.dumps(config)),  # as a reader will see it: keys are strings, tuples are lists
    }
    return manifest | {"sha256": _self_digest(manifest)}


def _verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint; UserError, naming the file, if anything in it is not as it was written."""
    path = checkpoint / MANIFEST
    mend = "resume from an earlier checkpoint"
    if not path.is_file():
        raise UserError(f"{checkpoint} is not a checkpoint (it has no {MANIFEST}): give a run or a step-* folder")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = manifest.pop("sha256") == _self_digest(manifest)
    except (ValueError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"checkpoint file {path} is damaged: {mend}")
    if manifest["format"] != _FORMAT:
        raise UserError(f"{path} has format {manifest['format']}, not {_FORMAT}: use the tbcm version that wrote it")
    files = {checkpoint / name: entry for name, entry in manifest["files"].items()}
    for file, entry in files.items():
        if not file.is_file():
            raise UserError(f"checkpoint file {file} is missing: {mend}")
        if (size := file.stat().st_size) != entry["bytes"]:
            raise UserError(f"checkpoint file {file} has {size} bytes, not the {entry['bytes']} written: {mend}")
    with ThreadPoolExecutor() as pool:
        for (file, entry), digest in zip(files.items(), pool.map(_sha256, files), strict=True):
            if digest != entry["sha256"]:
                raise UserError(f"checkpoint file {file} is damaged (its SHA-256 differs): {mend}")
    return manifest


def _newest_whole(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    root = folder / "checkpoints"
    checkpoints = _checkpoints(root)
    for step in sorted(checkpoints, reverse=True):
        try:
            return checkpoints[step], _verify(checkpoints[step])
        except UserError as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
    if checkpoints:
        raise UserError(f"all {len(checkpoints)} checkpoints in {root} are damaged: move them away to start afresh")
    return None


def _checkpoints(root: Path) -> dict[int, Path]:
    named = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in root.glob("step-*"))
    return {int(match[1]): path for match, path in named if match}


def _prune(root: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    checkpoints = _checkpoints(root)
    with explain_os_errors(root):
        for later in filter(lambda other: other > step, list(checkpoints)):
            # Left by a run that was resumed from before them: were they kept, the next resume would go back to them.
            path = checkpoints.pop(later)
            logger.warning("%s is later than the run is now: renamed to stale-%s", path, path.name)
            shutil.rmtree(path.with_name(f"stale-{path.name}"), ignore_errors=True)
            path.rename(path.with_name(f"stale-{path.name}"))
        for old in sorted(checkpoints)[: -max(1, keep_last)]:
            if not (keep_every and old % keep_every == 0):
                # Renamed first: a kill half way must not leave something that looks like a checkpoint.
                doomed = checkpoints[old].rename(root / f"{TEMPORARY_PREFIX}{checkpoints[old].name}")
                shutil.rmtree(doomed)


def _remove_leftovers(root: Path) -> None:
    """Of a process that was killed while it wrote or deleted. Safe: `files.RunLock` keeps a second one out."""
    with explain_os_errors(root):
        for path in root.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(path)


def _self_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
