"""A student's folder: the teacher's own pipeline with another network and another scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tbcm.errors import UserError, first_line
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.models.families.text import assembled


def copy_pipeline(
    teacher: FamilyPipeline, network: nn.Module, scheduler: Any, out: Path, dtype: torch.dtype, **parts: Any
) -> None:
    """Writes it to the folder `out`, with `parts` in the place of the teacher's. Raises UserError where a part of the
    teacher's cannot be loaded."""
    own = {"scheduler": scheduler, teacher.family.network: network}
    if teacher.index.get("vae"):
        own["vae"] = teacher.load_vae(dtype)
    encoders = teacher.load_encoders(dtype, without=parts)
    try:
        pipe = assembled(teacher.location, teacher.index, dtype, **own, **encoders, **parts, **teacher.at_revision)
    except (OSError, ImportError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{teacher.path}: cannot be loaded whole ({first_line(error)})") from None
    pipe.save_pretrained(out)
