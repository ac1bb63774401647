"""Checkpoints: whole or absent, checked when read, and restored bit for bit on any number of ranks.

    RUN/checkpoints/step-00000123/manifest.json     step, configuration, versions; size and SHA-256 of every file
                                  .metadata *.distcp  torch.distributed.checkpoint's files: every tensor and number

A run writes them with `checkpoint_writer.CheckpointWriter`, while it goes on.
DCP's files hold pickles: load only checkpoints that you trust.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from tbcm.errors import UserError
from tbcm.runtime import distributed
from tbcm.runtime.checkpoint_files import MANIFEST, check_files, checkpoints_in, read_manifest
from tbcm.runtime.checkpoint_writer import CheckpointWriter, first_failure

logger = logging.getLogger(__name__)


def save(
    folder: str | os.PathLike[str],
    step: int,
    state: dict[str, Any],
    *,
    config: dict[str, Any],
    keep_last: int = 2,
    keep_every: int | None = None,
) -> Path:
    """Writes RUN/checkpoints/step-`step` for the run in `folder` and returns when it is whole: one save by a
    `CheckpointWriter` that is not asynchronous, with its arguments and errors. Every rank calls it."""
    writer = CheckpointWriter(folder, keep_last=keep_last, keep_every=keep_every, asynchronous=False)
    writer.save(step, state, config)
    assert writer.saved
    return writer.saved[1]


def load(
    path: str | os.PathLike[str], state: dict[str, Any], *, optional: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Restores `state` in place from a checkpoint folder, or from the newest whole checkpoint of a run's folder.

    `state` is as for `save`, with everything of the right shape already there, sharded or not, whatever it was when it
    was saved; it may name fewer things than were saved (only "ema", to sample). Every rank calls it.

    Args:
        optional: what may be empty in `state` or in the checkpoint, by its name there, and what to call it. Where it is
            in one of them only, it stays as it is, and a warning says so.

    Returns:
        The manifest: "step", "config", "versions" and so on.

    Raises:
        UserError: nothing to load, a damaged file (named), or a checkpoint of another model or optimiser.
    """
    given = Path(path)
    if not distributed.run_on_main((given / "checkpoints").is_dir):
        checkpoint, manifest = given, _verify(given)
    elif found := _newest_whole(given):
        checkpoint, manifest = found
    else:
        raise UserError(f"no checkpoint in {given / 'checkpoints'}: start the run without resuming")
    reader = dcp.FileSystemReader(checkpoint)
    lacking = [name for name, what in (optional or {}).items() if not _agree(reader, name, state[name], what)]
    state = {name: part for name, part in state.items() if name not in lacking}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, no_dist=not distributed.is_initialized())
    except CheckpointException as error:
        raise UserError(
            f"checkpoint {checkpoint} does not fit this model or optimizer ({first_failure(error)}): "
            f"use the configuration in its {MANIFEST}; where that is this one, tbcm's optimizer has come to keep"
            " other state since then (CAME, of convolutions): go on with that version of tbcm, or start another run"
        ) from error
    return manifest


def _agree(reader: dcp.FileSystemReader, name: str, part: Any, what: str) -> bool:
    """Whether both a checkpoint and `part` have something under `name`, or neither has."""
    here = bool(part.state_dict())
    there = distributed.run_on_main(
        lambda: any(key.startswith(f"{name}.") for key in reader.read_metadata().state_dict_metadata)
    )
    if here != there and distributed.is_main():
        how = "has none: it begins anew" if here else "has one that is not needed now: it is left out"
        logger.warning("%s: checkpoint %s %s", what, reader.path, how)
    return here == there


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint of the run in `folder`, or None where none was saved; every rank calls it.

    A damaged one is passed over with a logged warning. Reads every byte of the checkpoint it returns.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found = _newest_whole(Path(folder))
    return found[0] if found else None


def _newest_whole(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    root = folder / "checkpoints"
    checkpoints = distributed.run_on_main(lambda: checkpoints_in(root))
    for step in sorted(checkpoints, reverse=True):
        try:
            return checkpoints[step], _verify(checkpoints[step])
        except UserError as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
    if checkpoints:
        raise UserError(f"all {len(checkpoints)} checkpoints in {root} are damaged: move them away to start afresh")
    return None


def _verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint; UserError, naming the file, if anything in it is not as it was written.

    Each rank reads a share of the files.
    """
    ranks = distributed.everyone()
    manifest = ranks.on_main(lambda: read_manifest(checkpoint))
    share = list(manifest["files"].items())[ranks.rank :: ranks.world]
    ranks.on_each(lambda: check_files(checkpoint, share))
    return manifest
