"""From a configuration to the parts of a run: precisions, networks, text, prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from tbcm.config import Config, Precision
from tbcm.data.prompts import load_prompts
from tbcm.models.loading import Pipeline, black_latent, load_teacher, student_from_teacher
from tbcm.models.sana import SanaTrigFlow
from tbcm.models.text import MiniLMEncoder, TextEncoder, load_gemma
from tbcm.rollouts import TextConditions


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


def pipeline_of(config: Config) -> Pipeline:
    return Pipeline(config.teacher.path, config.teacher.revision)


def build_parts(config: Config, device: torch.device) -> Parts:
    """Everything from files, cheapest first, so that bad input is found early."""
    prompts = build_prompts(config)
    teacher = build_teacher(config, device)
    black = build_black_latent(config, device)
    return Parts(teacher, build_student(config, teacher), build_text(config, device), prompts, black)


def build_prompts(config: Config) -> Sequence[str]:
    path = config.data.prompts
    shipped = resources.files("tbcm.emoji") / "assets" / "prompts.txt"
    return load_prompts(Path(str(shipped)) if path == "emoji" else Path(path), config.data.column)


def build_text(config: Config, device: torch.device) -> TextConditions:
    text = config.text
    encoder: TextEncoder
    if text.encoder == "minilm":
        encoder = MiniLMEncoder(text.max_tokens, device)
    else:
        encoder = load_gemma(
            text.path or pipeline_of(config).location,
            dtype=dtype_of(text.precision, device),
            device=device,
            max_tokens=text.max_tokens,
        )
    return TextConditions(encoder, config.teacher.null_mask)


def build_teacher(config: Config, device: torch.device) -> SanaTrigFlow:
    return load_teacher(pipeline_of(config), dtype_of(config.teacher.precision, device), device)


def build_student(config: Config, teacher: SanaTrigFlow) -> SanaTrigFlow:
    """A student equal to the conditional teacher. Its new layers' random part depends on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        return student_from_teacher(
            teacher,
            tangent=config.student.tangent,
            gradient_checkpointing=config.student.gradient_checkpointing,
            compiled=config.student.compile,
        )


def build_black_latent(config: Config, device: torch.device) -> Tensor:
    cache = Path(config.out) / "black_latent.safetensors"
    return black_latent(pipeline_of(config), config.teacher.image_size, cache, device)
