"""A student's folder: the teacher's own pipeline with another network and another scheduler."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from tbcm.errors import UserError, first_line
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.models.families.text import UNUSED


def copy_pipeline(
    teacher: FamilyPipeline, network: nn.Module, scheduler: Any, out: Path, dtype: torch.dtype, **parts: Any
) -> None:
    """Writes it to the folder `out`, with `parts` in the place of the teacher's. Raises UserError where a part of the
    teacher's cannot be loaded."""
    cls = getattr(diffusers, teacher.index["_class_name"])
    taken = inspect.signature(cls.__init__).parameters
    options: dict[str, Any] = {part: None for part in UNUSED if part in taken}
    if "requires_safety_checker" in taken:
        options["requires_safety_checker"] = False
    if teacher.revision:
        options["revision"] = teacher.revision
    try:
        pipe = cls.from_pretrained(
            teacher.location,
            torch_dtype=dtype,
            scheduler=scheduler,
            **{teacher.family.network: network},
            **options,
            **parts,
        )
    except (OSError, ImportError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{teacher.path}: cannot be loaded whole ({first_line(error)})") from None
    pipe.save_pretrained(out)
