"""From a configuration to the parts of a run: precisions, networks, text, prompts."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbcm.config import Config, Precision, Switch
from tbcm.config.resolution import Size
from tbcm.data.captions import PromptSource
from tbcm.data.conditions import CachedConditions
from tbcm.data.embeddings import CachedEncoder
from tbcm.data.images import CaptionedImages, open_images
from tbcm.data.latents import CaptionedLatents, PrecomputedLatents
from tbcm.data.prompts import load_prompts
from tbcm.errors import UserError
from tbcm.icons.masks import SIZE
from tbcm.method.types import Condition
from tbcm.models.families.pipeline import FamilyPipeline, open_pipeline
from tbcm.models.fp8 import relative_error, to_fp8
from tbcm.models.identity import model_identity
from tbcm.models.loading import (
    AnyPipeline,
    black_latents,
    general_student,
    load_teacher,
    lora_student_from_teacher,
    student_from_teacher,
)
from tbcm.models.network import DiffusersNetwork
from tbcm.models.pipeline import Pipeline
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.models.text import MiniLMEncoder, TextEncoder, load_gemma, sana_instruction
from tbcm.runtime import distributed
from tbcm.runtime.seeding import seeded
from tbcm.samples.noised import VaeLatents
from tbcm.samples.rollouts import Text, TextConditions

logger = logging.getLogger(__name__)


AnyNetwork = SanaTrigFlow | DiffusersNetwork


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


def teacher_weights(config: Config, device: torch.device) -> torch.dtype:
    """How the teacher's weights are kept."""
    half = config.teacher.half_weights
    return weights_dtype(dtype_of(config.teacher.precision, device)) if half else torch.float32


def teacher_autocast(config: Config, device: torch.device) -> torch.autocast:
    """Casts weights that are kept in more precision than they compute in."""
    dtype = dtype_of(config.teacher.precision, device)
    return autocast(dtype if teacher_weights(config, device) != dtype else torch.float32, device)


def student_weights(config: Config, device: torch.device) -> torch.dtype:
    """How the weights of a student that is no longer trained are kept."""
    return weights_dtype(dtype_of(config.student.precision, device))


def weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """How frozen weights that compute in `dtype` are kept: fp16 has too little range for whole networks in it, so those
    stay in fp32 and autocast; bf16 weights are half the memory and are not cast again on every call."""
    return torch.float32 if dtype == torch.float16 else dtype


def default_guidance(config: Config) -> float:
    """The middle one of those trained on."""
    scales = sorted(config.method.guidance)
    return scales[len(scales) // 2]


def files_of(config: Config) -> Pipeline:
    """The teacher's files, of whatever pipeline class."""
    teacher = config.teacher
    return Pipeline(teacher.path, teacher.revision, teacher.timestep_scale, teacher.variant)


def pipeline_of(config: Config) -> AnyPipeline:
    return open_pipeline(files_of(config))


def check_sizes(config: Config) -> None:
    """Raises UserError where the teacher makes no images of a size in `resolution`."""
    pipeline = pipeline_of(config)
    for size in config.resolution:
        pipeline.check_size(size)


def text_pipeline_of(config: Config) -> Pipeline:
    """Where Gemma and its tokenizer lie."""
    path, teacher = config.text.path, config.teacher
    return Pipeline(path, variant=teacher.variant) if path else files_of(config)


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


def build_prompts(config: Config) -> PromptSource:
    """Kept in the run's folder: checkpoints need it to be shared by all nodes anyway."""
    path = config.data.prompts
    shipped = resources.files("tbcm.icons") / "assets" / "prompts.txt"
    return load_prompts(
        str(shipped) if path == "icons" else path, config.data.column, folder=Path(config.out) / "prompts"
    )


def build_latents(config: Config, device: torch.device) -> tuple[CaptionedLatents, Any]:
    """What the baselines train on: precomputed latents, or images and the VAE that encodes them in every step."""
    data = config.data
    if data.latents is not None:
        precomputed = PrecomputedLatents(data.latents, device)
        precomputed.check(distributed.run_on_main(lambda: latents_identity(config)))
        return precomputed, None
    images = build_images(config)
    vae = build_vae(config, device)
    return VaeLatents(pipeline_of(config), vae, images, device, data.max_bad_share), vae


def build_images(config: Config) -> CaptionedImages:
    """Those of data.images."""
    data = config.data
    assert data.images is not None
    if data.images == "icons" and any(size != (SIZE, SIZE) for size in config.resolution):
        raise UserError(f"data.images=icons: the icons have {SIZE} px: set resolution={SIZE}")
    return open_images(data.images, data.caption_column, data.max_bad_share)


def latents_identity(config: Config) -> dict[str, Any]:
    """What decides an image's latent, but for rounding: a cache must agree with the configuration in all of it."""
    pipeline = pipeline_of(config)
    return {
        "teacher.path": model_identity(pipeline.location, pipeline.revision, ["vae"]),
        "resolution": [list(size) for size in config.resolution],
        "scaling_factor": pipeline.scaling_factor,
    }


def vae_weights(config: Config, device: torch.device) -> torch.dtype:
    """How the weights of a VAE that encodes are kept."""
    return weights_dtype(dtype_of(config.teacher.precision, device))


def build_vae(config: Config, device: torch.device) -> Any:
    """None for a teacher of pixels."""
    vae = pipeline_of(config).load_vae(vae_weights(config, device))
    return vae and vae.to(device)


def build_text(config: Config, device: torch.device) -> Text:
    """With a text encoder, whether or not the configuration names a cache."""
    teacher = pipeline_of(config)
    if isinstance(teacher, FamilyPipeline):
        return teacher.load_text(weights_dtype(dtype_of(config.text.precision, device)), device)
    return TextConditions(build_encoder(config, device), config.teacher.null_mask)


def build_encoder(config: Config, device: torch.device) -> TextEncoder:
    """Sana's."""
    if config.text.encoder == "minilm":
        encoder = MiniLMEncoder(config.text.max_tokens, device)
        check_text_width(config, encoder.dim)
        return encoder
    pipeline = text_pipeline_of(config)
    check_text_width(config, pipeline.text_width())
    dtype = text_weights(config, device)
    return load_gemma(pipeline, dtype=dtype, device=device, max_tokens=config.text.max_tokens)


def check_text_width(config: Config, width: int) -> None:
    """Raises UserError where the teacher takes in text states of another width."""
    if (wanted := files_of(config).config("transformer")["caption_channels"]) != width:
        raise UserError(
            f"text.encoder={config.text.encoder} gives states of width {width}, and the teacher {config.teacher.path}"
            f" takes in caption_channels = {wanted}: choose the text encoder that it was trained with"
        )


def text_weights(config: Config, device: torch.device) -> torch.dtype:
    """How the text encoder's weights are kept. MiniLM is small; Gemma-2 overflows in fp16."""
    small = config.text.encoder == "minilm"
    return torch.float32 if small else weights_dtype(dtype_of(config.text.precision, device))


def text_identity(config: Config) -> dict[str, Any]:
    """What decides a prompt's states, but for rounding: a cache must agree with the configuration in all of it."""
    text, teacher = config.text, pipeline_of(config)
    if isinstance(teacher, FamilyPipeline):
        return {
            "teacher.path": model_identity(teacher.location, teacher.revision, teacher.text_parts),
            "pipeline": teacher.family.pipeline,
            "resolution": [list(size) for size in config.resolution],
        }
    gemma = text.encoder == "gemma2"
    where, revision = (text.path, None) if text.path else (teacher.location, teacher.revision)
    return {
        "text.encoder": text.encoder,
        "text.path": model_identity(where, revision, ["tokenizer", "text_encoder"]) if gemma else None,
        "text.max_tokens": text.max_tokens,
        "instruction": hashlib.sha256("\n".join(sana_instruction()).encode()).hexdigest()[:16] if gemma else None,
    }


def build_cached_text(config: Config, prompts: PromptSource, device: torch.device) -> Text:
    """Without a text encoder. Raises UserError where the cache is not of this configuration and these prompts."""
    assert config.text.cache is not None
    family = isinstance(pipeline_of(config), FamilyPipeline)
    cached = CachedConditions(config.text.cache, device) if family else CachedEncoder(config.text.cache, device)
    cached.check(distributed.run_on_main(lambda: {**text_identity(config), "data.prompts": prompts.digest()}))
    if unknown := [prompt for prompt in config.log.preview_prompts if prompt not in cached]:
        raise UserError(f"log.preview_prompts: {unknown[0]!r} is not in text.cache={config.text.cache}; take it out")
    if isinstance(cached, CachedConditions):
        return cached
    check_text_width(config, cached.dim)
    return TextConditions(cached, config.teacher.null_mask)


def build_teacher(config: Config, device: torch.device, dtype: torch.dtype | None = None) -> AnyNetwork:
    """The frozen teacher, with weights in `dtype` (default: as configured)."""
    dtype = dtype or teacher_weights(config, device)
    compiled = switch(config.teacher.compile, device)
    pipeline = pipeline_of(config)
    if isinstance(pipeline, FamilyPipeline):
        if config.teacher.fp8:
            raise UserError("teacher.fp8=true is for Sana: this teacher's layers are not known one by one")
        return pipeline.load_teacher(dtype, device, compiled=compiled)
    return load_teacher(pipeline, dtype, device, compiled=compiled, text_once=config.text.once)


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


def build_black_latents(config: Config, device: torch.device) -> dict[Size, Tensor]:
    """Made by rank 0 where the teacher's folder does not carry them, and kept in the run's folder, or with precomputed
    latents."""
    pipeline = pipeline_of(config)
    precomputed = config.data.latents if config.method.from_images else None
    folder = Path(precomputed or config.out)

    def make() -> dict[Size, Tensor]:
        found = black_latents(pipeline, config.resolution, folder, device)
        return {size: black.cpu() for size, black in found.items()}

    return {size: black.to(device) for size, black in distributed.run_on_main(make).items()}
