"""Everything that a training run works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbcm.config import Config
from tbcm.config.resolution import Size
from tbcm.data.latents import CaptionedLatents
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.samples.rollouts import Text
from tbcm.setup.images import build_black_latents, build_latents
from tbcm.setup.networks import AnyNetwork, build_student, build_teacher, check_sizes, quantise
from tbcm.setup.precision import teacher_weights
from tbcm.setup.text import build_cached_text, build_prompts, build_text


@dataclass(frozen=True)
class Parts:
    """What a trainer works on. `black` has the scaled latent [C, h, w] of a black image of each size.
    `latents`, and the `vae` that encodes images to them unless they are precomputed, are the baselines'."""

    teacher: AnyNetwork
    student: AnyNetwork
    text: Text
    prompts: Sequence[str]
    black: Mapping[Size, Tensor]
    latents: CaptionedLatents | None = None
    vae: Any = None


def build_parts(config: Config, device: torch.device) -> Parts:
    """Everything from files, cheapest first, so that bad input is found early."""
    check_sizes(config)
    prompts, latents, vae = build_prompts(config), None, None
    cached = build_cached_text(config, prompts, device) if config.text.cache else None
    if config.method.from_images:
        latents, vae = build_latents(config, device)
    kept = teacher_weights(config, device)
    teacher = build_teacher(config, device, kept if config.student.lora else torch.float32)
    student = build_student(config, teacher)  # from full precision, before weights are rounded, unless it shares them
    teacher.to(kept)
    black = build_black_latents(config, device)
    text = cached or build_text(config, device)
    if config.teacher.fp8:
        null = text.null_prompt(size := config.resolution[0])
        assert isinstance(teacher, SanaTrigFlow) and null is not None
        quantise(teacher, null, black[size].shape)
    return Parts(teacher, student, text, prompts, black, latents, vae)
