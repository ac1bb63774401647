"""What is evaluated, and the teacher that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tbcm.errors import UserError
from tbcm.evaluation.stored import fingerprint, meaning, sha256
from tbcm.inference.generation import Sampler, open_sampler
from tbcm.inference.student import Origin, open_origin
from tbcm.runtime import checkpoint, distributed
from tbcm.runtime.checkpoint_files import MANIFEST
from tbcm.setup.networks import build_teacher


@dataclass(frozen=True)
class Candidate:
    """A sampler, and what tells its images from others' (JSON): weights, and how text, time and latents are meant."""

    sampler: Sampler
    identity: dict[str, Any]


@dataclass(frozen=True)
class Candidates:
    """`teacher` is None where none is known. `icons`: whether it is the shipped one."""

    student: Candidate
    teacher: Candidate | None
    icons: bool


def open_candidates(
    path: str, device: torch.device, *, teacher: bool, average: bool, agree_with: str | None, batch: int
) -> Candidates:
    """What is at `path` (`teacher`: the teacher there, in the student's place), and its teacher: a run's own,
    `agree_with`, or a teacher itself. Every rank calls it."""
    origin = open_origin(path)
    if (frames := origin.config.frames) > 1:
        raise UserError(f"{path}: makes videos of {frames} frames, and all that is measured here is of images")
    # Before the weights are read: of a run that goes on, they may then be newer than said, never older.
    identity = _identity(origin, teacher=teacher, average=average)
    sampler = open_sampler(path, teacher=teacher, average=average, device=device.type)
    student = Candidate(sampler, identity)
    reference: Candidate | None = None
    if agree_with is not None:
        other = open_origin(agree_with)
        reference = Candidate(
            open_sampler(agree_with, teacher=True, device=device.type, size=sampler.size),
            _identity(other, teacher=True, average=False),
        )
        if reference.sampler.shape != sampler.shape:
            raise UserError(
                f"--agree-with {agree_with}: its latents are {list(reference.sampler.shape)}, those of {path}"
                f" {list(sampler.shape)}; give the teacher it was distilled from"
            )
        icons = other.config.teacher.path == "icons"
    else:
        icons = origin.config.teacher.path == "icons"
        if teacher:
            reference = student
        elif origin.is_run:
            net = build_teacher(origin.config, device)
            mine = Sampler(net, sampler.text, origin.config, origin.pipeline, teacher=True)
            reference = Candidate(mine, _identity(origin, teacher=True, average=False))
    for each in filter(None, (student, reference)):
        each.sampler.batch = batch
    return Candidates(student, reference, icons)


def _identity(origin: Origin, *, teacher: bool, average: bool) -> dict[str, Any]:
    config = origin.config
    decoded_by = distributed.run_on_main(lambda: fingerprint(origin.pipeline))
    if not origin.is_run or teacher:
        return {"teacher": teacher, "pipeline": decoded_by, **meaning(config)}
    newest = checkpoint.latest(origin.path)
    if newest is None:
        raise UserError(f"{origin.path}: the run has no checkpoint yet; wait for one, or evaluate its --teacher")
    return {
        "run": str(Path(origin.path).resolve()),
        "checkpoint": newest.name,
        "manifest": distributed.run_on_main(lambda: sha256(newest / MANIFEST)),
        "weights": "ema" if average else "last",
        "pipeline": decoded_by,
        **meaning(config),
    }
