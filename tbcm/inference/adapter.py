"""A LoRA run's adapter alone, which plain diffusers loads into the teacher's own pipeline.

A guidance scale that the teacher does not embed is one constant for one scale: it is written as the bias of an adapter
(peft's `lora_bias`) on the layer behind which it stands, beside a matrix of zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SCMScheduler
from torch import Tensor

from tbcm.config import Config
from tbcm.errors import UserError
from tbcm.inference.exporting import check_jumps, is_sprints, own_pipeline
from tbcm.inference.pipeline_call import adapter_call, adapter_card
from tbcm.inference.student import PIPELINE_CONFIG, Origin, adapter_of_run, open_run
from tbcm.models.embedders import time_embedders
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.models.loading import AnyPipeline
from tbcm.models.network import DiffusersNetwork
from tbcm.models.pipeline import Pipeline
from tbcm.models.sana.guidance import guidance_shift
from tbcm.runtime.files import atomic_folder
from tbcm.setup.networks import AnyNetwork


def export_adapter(run: str, out: Path, *, dtype: torch.dtype, average: bool = True) -> str:
    """Writes the folder `out`: the adapter as `load_lora_weights` takes it, the scheduler, and how to call them. Of the
    teacher's weights nothing is read. Returns the call.

    Raises:
        UserError: not a run, a run without adapters, or a pipeline class that cannot express them.
    """
    from tbcm.models.lora import state_of

    origin = open_run(run)
    if origin.config.student.lora is None:
        raise UserError(f"{run}: trained all weights (student.lora is null): export it without --adapter")
    check_jumps(origin)
    config, pipeline = origin.config, adapter_pipeline(origin)
    scheduler = _scheduler(pipeline, config)
    student = adapter_of_run(origin, average=average)
    shifts = {} if _embeds_guidance(pipeline) else guidance_shifts(student, config.method.default_guidance)
    state = {name: value.to(dtype) for name, value in state_of(student.backbone, shifts).items()}
    if not isinstance(student, DiffusersNetwork) and shifts:  # where diffusers has it without a guidance embedding
        state = {name.replace("time_embed.timestep", "time_embed.emb.timestep"): x for name, x in state.items()}
    cls = getattr(diffusers, pipeline.index["_class_name"])
    network = pipeline.family.network if isinstance(pipeline, FamilyPipeline) else "transformer"
    with atomic_folder(out) as part:
        cls.save_lora_weights(part, **{f"{network}_lora_layers": state})
        scheduler.save_pretrained(part / "scheduler")
        (part / PIPELINE_CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        (part / "README.md").write_text(adapter_card(pipeline, config, str(out), dtype), encoding="utf-8")
    return adapter_call(pipeline, config, str(out), dtype)


def adapter_pipeline(origin: Origin) -> AnyPipeline:
    """The teacher's own pipeline: a `Pipeline` where that is SanaSprintPipeline, which embeds guidance itself. Raises
    UserError where it cannot run this student's adapter."""
    pipeline = origin.pipeline
    name = pipeline.index.get("_class_name")
    if not hasattr(getattr(diffusers, str(name), None), "load_lora_weights"):
        raise UserError(f"{origin.path}: diffusers' {name} has no load_lora_weights: export the run without --adapter")
    if name == "SanaSprintPipeline" and is_sprints(origin):
        return pipeline
    return own_pipeline(origin)


def _embeds_guidance(pipeline: AnyPipeline) -> bool:
    """Whether the teacher of a Sana does: its student has that embedding, and none of its own."""
    return isinstance(pipeline, Pipeline) and bool(pipeline.config("transformer")["guidance_embeds"])


def _scheduler(pipeline: AnyPipeline, config: Config) -> Any:
    if isinstance(pipeline, FamilyPipeline):
        return pipeline.few_steps(1, config.resolution[0]).scheduler
    return SCMScheduler(sigma_data=config.method.sigma_data)


@torch.no_grad()
def guidance_shifts(student: AnyNetwork, guidance: float) -> dict[str, Tensor]:
    """What the student's embedding of a guidance scale adds behind layers of the backbone, by their names; nothing
    where it is the teacher's own."""
    backbone = student.backbone
    if isinstance(student, DiffusersNetwork):
        if student.guidance_embedding is None:
            return {}
        names = {id(layer): name for name, layer in backbone.named_modules()}
        w = torch.full((1,), guidance, device=student.guidance_embedding.hidden.weight.device)
        found = zip(time_embedders(backbone), student.guidance_embedding(w), strict=True)
        return {names[id(embedder.last)]: g[0] for embedder, g in found}
    return {"time_embed.timestep_embedder.linear_2": guidance_shift(student, guidance)}
