"""From a configuration to the parts of a run: precisions, networks, text, prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from tbcm.config import Config, Precision, Switch
from tbcm.data.prompts import load_prompts
from tbcm.errors import UserError
from tbcm.models.loading import Pipeline, black_latent, load_teacher, student_from_teacher
from tbcm.models.sana import SanaTrigFlow
from tbcm.models.text import MiniLMEncoder, TextEncoder, load_gemma
from tbcm.rollouts import TextConditions
from tbcm.runtime import distributed


@dataclass(frozen=True)
class Parts:
    """What a trainer works on. `black` [C, h, w] is the scaled latent of a black image; its shape is the latents'."""

    teacher: SanaTrigFlow
    student: SanaTrigFlow
    text: TextConditions
    prompts: Sequence[str]
    black: Tensor


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """auto: bf16 on CUDA from Ampere on, fp16 before (V100), fp32 elsewhere: few CPUs multiply bf16 faster."""
    if precision != "auto":
        return _DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def switch(value: Switch, device: torch.device) -> bool:
    """auto: on CUDA."""
    return device.type == "cuda" if value == "auto" else value


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """The context in which fp32 weights compute in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def teacher_autocast(config: Config, device: torch.device) -> torch.autocast:
    """For a teacher whose weights are in fp32 because it computes in fp16 (see `weights_dtype`)."""
    dtype = dtype_of(config.teacher.precision, device)
    return autocast(dtype if dtype == torch.float16 else torch.float32, device)


def weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """How frozen weights that compute in `dtype` are kept: fp16 has too little range for whole networks in it, so those
    stay in fp32 and autocast; bf16 weights are half the memory and are not cast again on every call."""
    return torch.float32 if dtype == torch.float16 else dtype


def pipeline_of(config: Config) -> Pipeline:
    return Pipeline(config.teacher.path, config.teacher.revision, config.teacher.timestep_scale)


def build_parts(config: Config, device: torch.device) -> Parts:
    """Everything from files, cheapest first, so that bad input is found early."""
    prompts = build_prompts(config)
    teacher = build_teacher(config, device, torch.float32)
    student = build_student(config, teacher)  # from the teacher's full precision, before its weights are rounded
    teacher.to(weights_dtype(dtype_of(config.teacher.precision, device)))
    black = build_black_latent(config, device)
    return Parts(teacher, student, build_text(config, device), prompts, black)


def build_prompts(config: Config) -> Sequence[str]:
    path = config.data.prompts
    shipped = resources.files("tbcm.emoji") / "assets" / "prompts.txt"
    return load_prompts(Path(str(shipped)) if path == "emoji" else Path(path), config.data.column)


def build_text(config: Config, device: torch.device) -> TextConditions:
    text, teacher = config.text, pipeline_of(config)
    encoder: TextEncoder
    if text.encoder == "minilm":
        encoder = MiniLMEncoder(text.max_tokens, device)
    else:
        encoder = load_gemma(
            text.path or teacher.location,
            revision=None if text.path else teacher.revision,
            dtype=weights_dtype(dtype_of(text.precision, device)),  # Gemma-2 overflows in fp16
            device=device,
            max_tokens=text.max_tokens,
        )
    return TextConditions(encoder, config.teacher.null_mask)


def build_teacher(config: Config, device: torch.device, dtype: torch.dtype | None = None) -> SanaTrigFlow:
    """The frozen teacher, with weights in `dtype` (default: as configured)."""
    dtype = dtype or weights_dtype(dtype_of(config.teacher.precision, device))
    compiled = switch(config.teacher.compile, device)
    return load_teacher(pipeline_of(config), dtype, device, compiled=compiled, text_once=config.text.once)


def build_student(config: Config, teacher: SanaTrigFlow) -> SanaTrigFlow:
    """A student equal to the conditional teacher. Its new layers' random part depends on the seed alone."""
    device = next(teacher.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.train.seed)
        return student_from_teacher(
            teacher,
            tangent=config.student.tangent,
            derivative=config.student.derivative,
            checkpointing=config.student.checkpointing,
            compiled=switch(config.student.compile, device),
            text_once=config.text.once,
        )


def build_black_latent(config: Config, device: torch.device) -> Tensor:
    """Made by rank 0 where the teacher's folder does not carry it, and kept in the run's folder."""
    pipeline, size = pipeline_of(config), config.teacher.image_size
    if size % pipeline.compression:
        raise UserError(
            f"teacher.image_size = {size}: should be a multiple of {pipeline.compression}, its VAE's factor"
        )
    return distributed.run_on_main(lambda: black_latent(pipeline, size, Path(config.out), device).cpu()).to(device)
