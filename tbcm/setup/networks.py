"""Teacher and student of a configuration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from tbcm.config import Config
from tbcm.errors import UserError
from tbcm.method.types import Condition
from tbcm.models.families.pipeline import FamilyPipeline, open_pipeline
from tbcm.models.flash import installed
from tbcm.models.fp8 import relative_error, to_fp8
from tbcm.models.loading import AnyPipeline, general_student
from tbcm.models.network import DiffusersNetwork
from tbcm.models.pipeline import Pipeline
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.models.sana.students import load_teacher, lora_student_from_teacher, student_from_teacher, teacher_of
from tbcm.runtime.seeding import seeded
from tbcm.setup.precision import default_dtype, dtype_of, switch, teacher_weights

logger = logging.getLogger(__name__)


AnyNetwork = SanaTrigFlow | DiffusersNetwork


def files_of(config: Config) -> Pipeline:
    """The teacher's files, of whatever pipeline class."""
    teacher = config.teacher
    return Pipeline(teacher.path, teacher.revision, teacher.timestep_scale, teacher.variant, config.frames)


def pipeline_of(config: Config) -> AnyPipeline:
    return open_pipeline(files_of(config))


def check_sizes(config: Config) -> None:
    """Raises UserError where the teacher makes no images of a size in `resolution`."""
    check_teacher(config, pipeline_of(config))


def check_teacher(config: Config, pipeline: AnyPipeline) -> None:
    """Raises UserError for what a configuration asks of a teacher that it cannot do."""
    for size in config.resolution:
        pipeline.check_size(size)
    if isinstance(pipeline, FamilyPipeline) and config.teacher.fp8:
        raise UserError("teacher.fp8=true is for Sana: this teacher's layers are not known one by one")


def build_teacher(config: Config, device: torch.device, dtype: torch.dtype | None = None) -> AnyNetwork:
    """The frozen teacher, with weights in `dtype` (default: as configured)."""
    dtype = dtype or teacher_weights(config, device)
    compiled = switch(config.teacher.compile, device)
    pipeline = pipeline_of(config)
    if isinstance(pipeline, FamilyPipeline):
        return with_flash_attention(config, pipeline.load_teacher(dtype, device, compiled=compiled))
    net = load_teacher(pipeline, dtype, device, compiled=compiled, text_once=config.text.once)
    return with_flash_attention(config, net)


def untrained_teacher(config: Config, pipeline: AnyPipeline, device: torch.device) -> AnyNetwork:
    """The frozen teacher with the first weights of its class, as the configuration keeps a teacher's."""
    compiled = switch(config.teacher.compile, device)
    part = pipeline.family.network if isinstance(pipeline, FamilyPipeline) else "transformer"
    with torch.device(device), default_dtype(teacher_weights(config, device)):
        backbone = pipeline.untrained(part)
    if isinstance(pipeline, FamilyPipeline):
        return with_flash_attention(config, pipeline.teacher_of(backbone, compiled=compiled))
    return teacher_of(backbone, pipeline.timestep_scale, compiled=compiled, text_once=config.text.once)


def with_flash_attention(config: Config, net: AnyNetwork) -> AnyNetwork:
    """A frozen network, its attention by flash-attn where `teacher.flash` says so. Raises UserError where it cannot
    be."""
    wanted = config.teacher.flash
    if not isinstance(net, DiffusersNetwork):
        if wanted is True:
            raise UserError("teacher.flash=true: Sana has no attention that flash-attn could take; leave it out")
        return net
    on_gpu = next(net.parameters()).is_cuda
    if wanted is True or (wanted == "auto" and on_gpu and installed() is not None):
        try:
            net.use_flash_attention()
        except ValueError as error:
            raise UserError(f"teacher.flash=true: {error}: pip install tbcm[flash], or leave it out") from None
    return net


def build_student(config: Config, teacher: AnyNetwork) -> AnyNetwork:
    """A student equal to the conditional teacher. Its new layers' random part depends on the seed alone."""
    device, student = next(teacher.parameters()).device, config.student
    if student.lora:
        check_shared_precision(config, next(teacher.parameters()).dtype, device)
    options: dict[str, Any] = {
        "tangent": student.tangent,
        "checkpointing": student.checkpointing,
        "compiled": switch(student.compile, device),
        "guidance_embeds_scale": student.guidance_embeds_scale,
        "logvar": config.method.continuous,
    }
    with seeded(device, config.train.seed, "student"):
        if isinstance(teacher, DiffusersNetwork):
            guided = len(set(config.method.guidance)) > 1
            return general_student(teacher, guided=guided, lora=student.lora, **options)
        options |= {"derivative": student.derivative, "text_once": config.text.once}
        if student.lora:
            return lora_student_from_teacher(teacher, student.lora, **options)
        return student_from_teacher(teacher, **options)


def check_shared_precision(config: Config, weights: torch.dtype, device: torch.device) -> None:
    """Raises UserError where the weights that a LoRA student shares have less precision than it computes in."""
    wanted = dtype_of(config.student.precision, device)
    if weights not in (torch.float32, wanted):
        raise UserError(
            f"student.lora shares the teacher's weights, which are kept in {weights}, and the student computes in"
            f" {wanted}: give both the same precision, or keep them in fp32 (teacher.half_weights=false)".replace(
                "torch.", ""
            )
        )


@torch.no_grad()
def quantise(teacher: SanaTrigFlow, prompt: Condition, shape: Sequence[int]) -> None:
    """The teacher in fp8, in place; logs its error on noise, where guidance matters most."""
    device = next(teacher.parameters()).device
    u = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    t, w = torch.full((1,), 1.5, device=device), torch.full((1,), 4.5, device=device)
    exact = teacher(u, t, prompt, w).F
    layers = to_fp8(teacher)
    error = relative_error(exact, teacher(u, t, prompt, w).F)
    logger.info("teacher in fp8: %d layers, relative error of its velocity %.2g", len(layers), error)
