"""A LoRA run's adapter alone, which plain diffusers loads into the teacher's own pipeline.

A guidance scale that the teacher does not embed is one constant for one scale: it is written as the bias of an adapter
(peft's `lora_bias`) on the layer behind which it stands, beside a matrix of zeros.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from torch import Tensor

from tbcm.errors import UserError
from tbcm.inference.exporting import check_jumps, own_pipeline
from tbcm.inference.pipeline_call import adapter_card
from tbcm.inference.student import PIPELINE_CONFIG, Origin, open_run, student_of_run
from tbcm.models.embedders import time_embedders
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.models.network import DiffusersNetwork
from tbcm.models.sana.guidance import guidance_shift
from tbcm.runtime.files import atomic_folder
from tbcm.setup.networks import AnyNetwork


def export_adapter(run: str, out: Path, *, dtype: torch.dtype, average: bool = True) -> Origin:
    """Writes the folder `out`: the adapter as `load_lora_weights` takes it, the scheduler, and how to call them.

    Raises:
        UserError: not a run, a run without adapters, or a pipeline class that cannot express them.
    """
    from tbcm.models.lora import state_of

    origin = open_run(run)
    if origin.config.student.lora is None:
        raise UserError(f"{run}: trained all weights (student.lora is null): export it without --adapter")
    check_jumps(origin)
    pipeline = adapter_pipeline(origin)
    few = pipeline.few_steps(1, origin.config.resolution[0])
    student = student_of_run(origin, torch.device("cpu"), average=average, merged=False)
    shifts = guidance_shifts(student, origin.config.method.default_guidance)
    state = {name: value.to(dtype) for name, value in state_of(student.backbone, shifts).items()}
    if not isinstance(student, DiffusersNetwork) and shifts:  # where diffusers has it without a guidance embedding
        state = {name.replace("time_embed.timestep", "time_embed.emb.timestep"): x for name, x in state.items()}
    cls = getattr(diffusers, pipeline.index["_class_name"])
    with atomic_folder(out) as part:
        cls.save_lora_weights(part, **{f"{pipeline.family.network}_lora_layers": state})
        few.scheduler.save_pretrained(part / "scheduler")
        (part / PIPELINE_CONFIG).write_text(origin.config.to_yaml(), encoding="utf-8")
        (part / "README.md").write_text(adapter_card(pipeline, origin.config, str(out), dtype), encoding="utf-8")
    return origin


def adapter_pipeline(origin: Origin) -> FamilyPipeline:
    """The teacher's own pipeline. Raises UserError where it cannot run this student's adapter."""
    name = origin.pipeline.index.get("_class_name")
    if not hasattr(getattr(diffusers, str(name), None), "load_lora_weights"):
        raise UserError(f"{origin.path}: diffusers' {name} has no load_lora_weights: export the run without --adapter")
    return own_pipeline(origin)


@torch.no_grad()
def guidance_shifts(student: AnyNetwork, guidance: float) -> dict[str, Tensor]:
    """What the student's embedding of a guidance scale adds behind layers of the backbone, by their names; nothing
    where it is the teacher's own."""
    backbone = student.backbone
    w = torch.full((1,), guidance, device=next(backbone.parameters()).device)
    if isinstance(student, DiffusersNetwork):
        if student.guidance_embedding is None:
            return {}
        names = {id(layer): name for name, layer in backbone.named_modules()}
        found = zip(time_embedders(backbone), student.guidance_embedding(w), strict=True)
        return {names[id(embedder.last)]: g[0] for embedder, g in found}
    return {"time_embed.timestep_embedder.linear_2": guidance_shift(student, guidance)}
