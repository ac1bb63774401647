"""Sana's teacher, and the student that starts equal to it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaCombinedTimestepGuidanceEmbeddings
from torch import nn

from tbcm.config.sections import Lora
from tbcm.errors import UserError
from tbcm.models.architecture import defaults_of
from tbcm.models.loading import freeze
from tbcm.models.pipeline import Pipeline
from tbcm.models.sana.network import SanaTrigFlow


def load_teacher(pipeline: Pipeline, dtype: torch.dtype, device: torch.device, **options: Any) -> SanaTrigFlow:
    """The frozen teacher, with weights in `dtype`; `options` go to SanaTrigFlow."""
    options.setdefault("timestep_scale", pipeline.timestep_scale)
    return teacher_of(pipeline.load_transformer(dtype).to(device), **options)


def teacher_of(backbone: SanaTransformer2DModel, timestep_scale: float, **options: Any) -> SanaTrigFlow:
    """The frozen teacher with this backbone; `options` go to SanaTrigFlow."""
    net = SanaTrigFlow(backbone, timestep_scale=timestep_scale, **{"differentiable": False} | options)
    freeze(net)
    return net


def student_from_teacher(
    teacher: SanaTrigFlow, *, guidance_embeds_scale: float | None = None, **options: Any
) -> SanaTrigFlow:
    """A trainable fp32 student that starts equal to the conditional teacher, on the teacher's device; `options` go to
    SanaTrigFlow.

    Where the teacher embeds no guidance the student gets an embedding whose last layer is zero, and the time
    embedding's keys are renamed to where diffusers keeps them beside one. It is of guidance times
    `guidance_embeds_scale` (default: as the teacher's configuration has it): its sines have frequencies of at most 1,
    so that by 0.1 guidances 3 and 5 differ by a twentieth of their embeddings' length, and by 1 by half of it.

    Raises:
        UserError: another scale for a teacher that embeds guidance itself.
    """
    config = _guided_config(teacher, guidance_embeds_scale)
    with torch.device(next(teacher.parameters()).device):
        backbone = SanaTransformer2DModel(**config)
    state = {
        key.replace("time_embed.emb.timestep_embedder.", "time_embed.timestep_embedder."): value
        for key, value in teacher.backbone.state_dict().items()
    }
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    new = [key for key in missing if not key.startswith("time_embed.guidance_embedder.")]
    if new or unexpected:
        raise ValueError(f"teacher and student differ: missing {new}, unexpected {unexpected}")
    if missing:
        _silence(backbone.time_embed.guidance_embedder)
    return SanaTrigFlow(backbone.train(), timestep_scale=teacher.timestep_scale, **{"logvar": True} | options)


def lora_student_from_teacher(
    teacher: SanaTrigFlow, lora: Lora, *, guidance_embeds_scale: float | None = None, **options: Any
) -> SanaTrigFlow:
    """As `student_from_teacher`, with adapters on the teacher's own weights (see `tbcm.models.lora`)."""
    from tbcm.models.lora import add_lora, tied

    config = _guided_config(teacher, guidance_embeds_scale)
    backbone = tied(teacher.backbone)
    add_lora(backbone, lora, leave_out=["patch_embed.proj"])  # whose tangent is that of a plain convolution
    if not teacher.embeds_guidance:
        backbone.time_embed = _with_guidance(backbone.time_embed, teacher.width)
    backbone.register_to_config(**config)
    student = SanaTrigFlow(backbone, timestep_scale=teacher.timestep_scale, **{"logvar": True} | options)
    return student.train()


def _with_guidance(embed: Any, width: int) -> SanaCombinedTimestepGuidanceEmbeddings:
    """What diffusers has beside a guidance embedding, of what it has without one; the embedding says nothing."""
    with torch.device(embed.linear.weight.device):
        combined = SanaCombinedTimestepGuidanceEmbeddings(width)
    combined.timestep_embedder, combined.linear = embed.emb.timestep_embedder, embed.linear
    _silence(combined.guidance_embedder)
    return combined


def _silence(embedder: Any) -> None:
    nn.init.zeros_(embedder.linear_2.weight)
    nn.init.zeros_(embedder.linear_2.bias)


def _guided_config(teacher: SanaTrigFlow, guidance_embeds_scale: float | None) -> dict[str, Any]:
    """Of a student's backbone. Raises UserError for another scale than that of a teacher that embeds guidance."""
    known = defaults_of(SanaTransformer2DModel)  # of what a file says beyond it, diffusers keeps a record
    config = {key: value for key, value in teacher.backbone.config.items() if key in known}
    if guidance_embeds_scale is not None:
        if config["guidance_embeds"] and guidance_embeds_scale != config["guidance_embeds_scale"]:
            raise UserError(
                f"student.guidance_embeds_scale = {guidance_embeds_scale:g}: the teacher embeds guidance itself, times"
                f" {config['guidance_embeds_scale']:g}; leave it out"
            )
        config["guidance_embeds_scale"] = guidance_embeds_scale
    return config | {"guidance_embeds": True}
