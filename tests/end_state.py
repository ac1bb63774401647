"""What a run has left in its folder, as plain tensors and rows, and how two runs differ in it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tbcm.errors import UserError
from tbcm.runtime import checkpoint

OF_THE_CLOCK = {"time", "samples_per_s", "seconds_per_step", "peak_gib"}
"""Keys of a row of metrics that no two runs share."""


def read(folder: Path) -> dict[str, Any]:
    """Everything in a checkpoint, whatever wrote it and on however many ranks, by its flattened name."""
    reader = dcp.FileSystemReader(folder)
    state: dict[str, Any] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        is_tensor = isinstance(stored, TensorStorageMetadata)
        state[name] = torch.empty(stored.size, dtype=stored.properties.dtype) if is_tensor else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def newest(run: Path) -> dict[str, Any]:
    folder = checkpoint.latest(run)
    assert folder is not None, f"no checkpoint in {run}"
    return read(folder)


def rows(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, also while it is written."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def differences(run: Path, reference: Path) -> list[str]:
    """How newest checkpoint and metrics of `run` differ from those of a run that nobody disturbed; none where they are
    bit for bit the same."""
    a, b = newest(run), newest(reference)
    found = [f"{name} is only in one checkpoint" for name in sorted(a.keys() ^ b.keys())]
    found += [f"{name} differs in the checkpoint" for name in sorted(a.keys() & b.keys()) if not same(a[name], b[name])]
    mine, others = rows(run), rows(reference)
    if (steps := [row["step"] for row in mine]) != (wanted := [row["step"] for row in others]):
        return [*found, f"metrics.jsonl has rows of steps {steps}, not of {wanted}"]
    for row, other in zip(mine, others, strict=True):
        changed = {key for key in row.keys() | other.keys() if row.get(key) != other.get(key)} - OF_THE_CLOCK
        found += [f"step {row['step']}: {key} {row.get(key)}, not {other.get(key)}" for key in sorted(changed)]
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        # As bytes: a NaN equals itself, and 0 is not -0.
        return a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    return bool(a == b)


def unreadable(run: Path) -> list[str]:
    """What is wrong with the checkpoints in a run's folder, which may be written at this moment."""
    root = run / "checkpoints"
    found = []
    for folder in sorted(root.glob("step-*")):
        try:
            checkpoint.load(folder, {})
            read(folder)
        except (UserError, OSError) as error:
            if folder.exists():  # else it has just been deleted as the oldest
                found.append(f"{folder} cannot be read: {error}")
    if len(temporary := list(root.glob(".tbcm-*"))) > 1:
        found.append(f"more than the newest temporary folder: {sorted(path.name for path in temporary)}")
    return found


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
